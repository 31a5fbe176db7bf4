"""Fine-tune the Qwen3.5 family from a notebook or a research script."""
