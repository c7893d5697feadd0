"""Measure what only a GPU can show: its decoder's pixels and rates, whole epochs.

    python -m benchmarks.on_gpu --out results
    python -m benchmarks.on_gpu --only pixels decoding
    python -m benchmarks.on_gpu --device cpu --tiny

Each stage is a process with a time limit, and prints a line per case. OUT gets a
STAGE.json, written after each case, so that whatever ends a stage leaves what it
measured; and profile.txt, the kernels of a step. On a CPU every stage takes the same
path.
"""

# Nothing but the standard library and torch: `pipelines.cli.command` needs tyro, which
# a bare GPU machine may lack.

from __future__ import annotations

import argparse
import importlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.machine import machine
from benchmarks.on_gpu.setting import Setting, Tasks
from benchmarks.result_file import write_result
from pipelines.hardware.device import find_device

_PROG = "benchmarks.on_gpu"
# The most informative first, each with its limit.
LIMITS_S: Mapping[str, float] = MappingProxyType(
    {"pixels": 80.0, "damaged": 30.0, "decoding": 100.0, "end_to_end": 220.0}
)
_TINY_PATIENCE = 5.0  # machines that try the script may be busy
_MAX_TEXT = 100


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a line where it is wrong."""
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, list(LIMITS_S)
    add("--only", nargs="+", default=names, choices=names, help="these stages alone")
    add("--out", type=Path, default=Path("on_gpu"), help="folder, by default on_gpu")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--tiny", action="store_true", help="smallest sizes, to try the script itself")
    add("--limit-s", type=float, help="seconds of each stage, instead of its own")
    # Of the process that measures one stage.
    add("--stage", choices=names, help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.limit_s is not None and not found.limit_s > 0:
        parser.error(f"expected --limit-s above 0, got {found.limit_s}")
    return found


def run_stages(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """Run the chosen stages in turn; return a line for each that ended badly."""
    options.out.mkdir(parents=True, exist_ok=True)
    bad = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        # What one stage compiles the next ones find.
        inductor = {"TORCHINDUCTOR_CACHE_DIR": str(Path(work, "inductor"))}
        for name in (name for name in LIMITS_S if name in options.only):
            print(f"== {name}", flush=True)
            stage = [*arguments, "--stage", name, "--work", work]
            code = subprocess.run(
                [sys.executable, "-m", _PROG, *stage], env={**os.environ, **inductor}
            ).returncode
            if code == -signal.SIGALRM:
                bad.append(f"{name} ran out of time")
            elif code:
                bad.append(f"{name} ended with {code}")
    return bad


def measure(tasks: Tasks, *, file: Path, limit_s: float) -> int:
    """Measure a stage's cases, write its figures after each; return 1 if one failed.

    The system ends this process at the limit, whatever it then waits for.
    """
    signal.alarm(math.ceil(limit_s))
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
    return int(bool(found["errors"]))


def _shown(value: Any) -> str:
    """Format figures with four digits, also within a mapping or a list."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_shown(of)}" for name, of in value.items())
    text = ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def _measure_stage(options: argparse.Namespace) -> int:
    limit_s = LIMITS_S[options.stage] * (_TINY_PATIENCE if options.tiny else 1.0)
    setting = Setting(
        device=find_device(options.device),
        tiny=options.tiny,
        work=options.work,
        out=options.out,
    )
    return measure(
        importlib.import_module(f"benchmarks.on_gpu.{options.stage}").tasks(setting),
        file=options.out / f"{options.stage}.json",
        limit_s=options.limit_s or limit_s,
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 1 if a stage failed or ran out of time, else 0."""
    options = parse_options(arguments)
    if options.stage:
        return _measure_stage(options)
    if bad := run_stages(options, arguments):
        print(f"{_PROG}: {'; '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
