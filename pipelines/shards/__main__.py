"""Run `python -m pipelines.shards`, which is `sovit-shards`."""

from pipelines.shards.command import main

if __name__ == "__main__":
    main()
