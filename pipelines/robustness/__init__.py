"""Measure how a checkpoint bears corrupted and slightly moved images."""
