"""Turn images of many kinds of source into Parquet shards."""
