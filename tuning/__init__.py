"""Hyperparameter search over the pipelines; above them, below the recipes."""
