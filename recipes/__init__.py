"""Runs only: each function returns one `pipelines.config.Run`."""
