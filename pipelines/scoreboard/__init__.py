"""Set what recipes are to reach beside what they reached: `python -m recipes`."""
