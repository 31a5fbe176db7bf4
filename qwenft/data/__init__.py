"""From conversations to micro-batches of one flat stream."""
