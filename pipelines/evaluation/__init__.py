"""Measure weights on held-out images: which, on what, and what comes of it."""
