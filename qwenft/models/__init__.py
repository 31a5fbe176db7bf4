"""The checkpoint in memory: loading, binding, adapters, loss, export."""
