"""Train image classifiers on Parquet shards with Ray, DALI and MLflow."""
