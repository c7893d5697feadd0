"""Measure what only a GPU can show: its decoder's pixels, rates and faults.

    python -m benchmarks.on_gpu --out results
    python -m benchmarks.on_gpu --only pixels decoding
    python -m benchmarks.on_gpu --device cpu --tiny

Prints a line per case. OUT gets a STAGE.json, written after each case, so that whatever
ends the command leaves what it measured. On a CPU every stage takes the same path.
"""

# Of the command line nothing but the standard library: `pipelines.cli.command` needs
# tyro, which a bare GPU machine may lack.

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.on_gpu.setting import Setting, Tasks
from benchmarks.rounds import write_result
from pipelines.hardware.device import find_device

_PROG = "benchmarks.on_gpu"
# Damaged images last: a decoder may take the process with it.
STAGES = ("pixels", "decoding", "damaged")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a line where it is wrong."""
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", default=STAGES, choices=STAGES, help="these stages alone")
    add("--out", type=Path, default=Path("on_gpu"), help="folder, by default on_gpu")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--tiny", action="store_true", help="smallest sizes, to try the script itself")
    return parser.parse_args(arguments)


def measure(tasks: Tasks, *, file: Path) -> list[str]:
    """Measure a stage's cases, write its figures after each; return what failed."""
    found: dict[str, Any] = {"machine": machine(), "cases": {}, "errors": {}}
    missing = list(tasks)
    write_result(file, found, missing=missing)
    for name, measure_case in tasks.items():
        start_s = time.perf_counter()
        try:
            figures = dict(measure_case())
        except Exception as error:  # it is told, and the next begins
            traceback.print_exc()
            found["errors"][name] = f"{type(error).__name__}: {error}"
            print(f"  {name}  FAILED  {found['errors'][name]}", flush=True)
        else:
            figures["seconds"] = time.perf_counter() - start_s
            found["cases"][name] = figures
            shown = [f"{of} {_shown(value)}" for of, value in figures.items()]
            print(f"  {name}  {'  '.join(shown)}", flush=True)
        missing.remove(name)
        write_result(file, found, missing=missing)
    return list(found["errors"])


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str]) -> int:
    """Run the stages in turn; return 1 if a case failed, else 0."""
    options = parse_options(arguments)
    device, bad = find_device(options.device), []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        setting = Setting(device=device, tiny=options.tiny, work=Path(work))
        for name in (name for name in STAGES if name in options.only):
            print(f"== {name}", flush=True)
            stage = importlib.import_module(f"benchmarks.on_gpu.{name}")
            bad += measure(stage.tasks(setting), file=options.out / f"{name}.json")
    if bad:
        print(f"{_PROG}: failed: {'; '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
