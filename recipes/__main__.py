"""Run `python -m recipes`, which lists them."""

from __future__ import annotations

from pipelines.scoreboard.command import main

if __name__ == "__main__":
    main()
