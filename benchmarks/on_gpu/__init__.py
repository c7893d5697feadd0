"""Measure what only a GPU can show, in stages, each in its own process."""
