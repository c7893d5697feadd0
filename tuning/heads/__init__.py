"""Precomputed tokens of a backbone, and heads trained on them."""
