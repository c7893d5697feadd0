"""Measure all that a GPU decides about, in stages, each in a process of its own."""
