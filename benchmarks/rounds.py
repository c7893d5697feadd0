"""Measure cases in turn, keep a record of each round, and show medians."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.machine import cpu_seconds, machine, machine_cpu_seconds

Record = Mapping[str, Any]
"""Figures of one round of one case, by name."""
# Pandas' own types are unions of all that an index might give.
Frame = Any
"""A `pd.DataFrame` of records, or a column of one."""


def run_rounds(
    cases: Mapping[str, Callable[[], Record]],
    *,
    num_rounds: int,
    options: object,
    path: Path | None,
    table: Callable[[Frame], str],
) -> None:
    """Record all cases in each round, so that a machine's drift hits all alike.

    The records are written to `path` after each case, and shown as a table at the end.
    A case that fails is left out from there on.

    Raises ValueError at the end, with the names of the cases that failed.
    """
    about = {"machine": machine(), "options": str(options)}
    records: list[Record] = []
    missing, errors = list(cases), dict[str, str]()
    try:
        for number in range(1, num_rounds + 1):
            for name in [name for name in cases if name not in errors]:
                others = OtherLoad()
                try:
                    found = {"round": number, "case": name, **cases[name]()}
                    records.append({**found, **others.record()})
                    shown = (f"{key} {_short(value)}" for key, value in found.items())
                    print("  ".join(shown), file=sys.stderr)
                except Exception as error:  # the others are measured all the same
                    if not isinstance(error, ValueError):
                        traceback.print_exc()
                    errors[name] = f"{type(error).__name__}: {error}"
                    print(f"{name} failed: {errors[name]}", file=sys.stderr)
                missing = [case for case in missing if case != name]
                content = {**about, "rounds": records, "errors": errors}
                write_result(path, content, missing=missing)
    finally:
        if records:
            frame: Frame = pd.DataFrame(records)
            print(table(frame))
            print(
                "meanwhile the rest of the machine was busy on "
                f"{shown_spread(frame['other_cores'], '.2f')} cores"
            )
        if missing:
            print(f"not measured: {'; '.join(missing)}", file=sys.stderr)
    if errors:
        raise ValueError(f"expected figures of all cases, got none of {list(errors)}")


class OtherLoad:
    """Load by other processes since it was made: a disturbance."""

    def __init__(self) -> None:
        self._start = self._clocks()

    @staticmethod
    def _clocks() -> tuple[float, float]:
        return time.monotonic(), machine_cpu_seconds() - cpu_seconds()

    def record(self) -> Record:
        """Return the mean number of cores that were busy with others."""
        (start_s, start_cpu_s), (now_s, cpu_s) = self._start, self._clocks()
        return {"other_cores": max(cpu_s - start_cpu_s, 0.0) / (now_s - start_s)}


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown_spread(values: Frame, form: str) -> str:
    """Format some rounds' median, lowest and highest."""
    low, high = values.min(), values.max()
    return f"{values.median():{form}} [{low:{form}}..{high:{form}}]"


def ratios(records: Frame, figure: str, *, to: str) -> Frame:
    """Divide each case's figure by another case's of the same round.

    So a machine's drift cancels out. Rounds are the rows, cases the columns.
    """
    wide = records.pivot(index="round", columns="case", values=figure)
    return wide.div(wide[to], axis=0)


def call_ms(function: Callable[[], object], *, device: str) -> float:
    """Time one call, with the GPU work that it queued."""
    if device == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start_s)


def write_result(
    path: Path | None, content: Mapping[str, Any], *, missing: Sequence[str]
) -> None:
    """Write figures as JSON, atomically; do nothing without a path.

    Args:
        missing: Names of the cases that were not measured yet.
    """
    if path is None:
        return
    partial = path.with_name(f"{path.name}.partial")
    shown = {**content, "missing": list(missing)}
    partial.write_text(json.dumps(shown, indent=2) + "\n")
    partial.replace(path)
