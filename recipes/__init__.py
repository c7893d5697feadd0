"""Recipes: each function returns one `pipelines.config.Run`."""
