"""Compute the tokens of a trained backbone once, and read them again and again."""
