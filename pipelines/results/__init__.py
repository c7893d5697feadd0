"""Compare runs that MLflow has: `sovit-compare` and `sovit-scoreboard`."""
