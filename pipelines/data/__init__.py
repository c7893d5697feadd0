"""Bring shards to the model: plan, read, stream, decode."""
