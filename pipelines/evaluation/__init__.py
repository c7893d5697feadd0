"""Evaluate weights on held-out sets: labels, scores, reports, figures."""
