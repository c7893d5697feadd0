"""Run `python -m benchmarks.on_gpu`."""

from __future__ import annotations

import sys

from benchmarks.on_gpu.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
