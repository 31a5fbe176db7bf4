"""The Qwen3.5 family as data: architectures, module roles, parameter counts."""
