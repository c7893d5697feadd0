"""Run `python -m recipes`, which lists them."""

from __future__ import annotations

from pipelines.results.scoreboard import main

if __name__ == "__main__":
    main()
