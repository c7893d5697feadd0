"""Run `python -m benchmarks.scale`."""

from __future__ import annotations

from benchmarks.scale.command import main

main()
