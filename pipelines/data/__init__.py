"""Feed shards to the model: plan, read, stream, batch, prefetch."""
