"""Run `python -m tuning.compare`."""

from __future__ import annotations

from tuning.compare.command import main

main()
