"""Measure what only a GPU can show: its decoder's pixels, rates and faults.

    python -m benchmarks.on_gpu --out results
    python -m benchmarks.on_gpu --only pixels decoding
    python -m benchmarks.on_gpu --device cpu --tiny

Prints a table per stage. OUT gets a STAGE.json, written after each case, so that
whatever ends the command leaves what it measured. On a CPU every stage takes the same
path.
"""

# Of the command line nothing but the standard library: `pipelines.cli.command` needs
# tyro, which a bare GPU machine may lack.

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.setting import Setting
from benchmarks.rounds import Frame, run_rounds
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


def main(arguments: Sequence[str]) -> int:
    """Run the stages in turn; return 1 if a case failed, else 0."""
    options = parse_options(arguments)
    device, bad = find_device(options.device), []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        setting = Setting(device=device, tiny=options.tiny, work=Path(work))
        for name in (name for name in STAGES if name in options.only):
            stage = importlib.import_module(f"benchmarks.on_gpu.{name}")
            try:
                run_rounds(
                    stage.tasks(setting),
                    num_rounds=1,
                    options=options,
                    path=options.out / f"{name}.json",
                    table=table,
                )
            except ValueError as error:
                bad.append(f"{name}: {error}")
    if bad:
        print(f"{_PROG}: {'; '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


def table(records: Frame) -> str:
    """Format a line per case."""
    shown = records.set_index("case").drop(columns=["round", "other_cores"])
    return shown.to_string(float_format="{:.4g}".format)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
