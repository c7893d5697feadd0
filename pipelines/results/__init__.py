"""Set runs of MLflow side by side: `sovit-compare`, `python -m pipelines.results`."""
