"""Hyperparameter search with Ray Tune over runs of `pipelines`."""
