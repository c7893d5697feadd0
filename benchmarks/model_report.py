"""Summarise the rounds of `benchmarks.model` as JSON and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch

from benchmarks.machine import busy_text
from benchmarks.model_cases import Case, Size
from benchmarks.model_rounds import Rounds
from benchmarks.timing import Spread, ratios, spread


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements and counts of one run of the benchmark."""

    found: Mapping[Case, Rounds]
    sizes: Mapping[tuple[str, str], Size]
    """By model and subject."""
    rates: Mapping[torch.dtype, Mapping[int, float]]
    """FLOP/s of matrix products, by type and side: the best of all rounds."""


def as_json(measured: Measured) -> dict[str, Any]:
    """Return all rounds, and the table's figures."""
    models: dict[str, Any] = {}
    for case, rounds in measured.found.items():
        size = asdict(measured.sizes[case.model, case.subject])
        network = models.setdefault(case.model, {}).setdefault(
            case.subject, {"name": case.label, **size, "stages": {}}
        )
        network["stages"][case.stage] = {
            "dtype": _name(case.dtype),
            **_figures(case, measured=measured),
            **asdict(rounds),
        }
    rates = {_name(dtype): dict(of) for dtype, of in measured.rates.items()}
    return {"matrix_flops_per_s": rates, "models": models}


def _figures(case: Case, *, measured: Measured) -> dict[str, Any]:
    """Summarise a case's rounds, alone and relative to other cases.

    "to" is its speed relative to the same network's `plain` and `eager`, and ours to
    `class` and `timm` at the same stage, round by round.
    """
    times_ms = {
        other: [one.step_ms for one in rounds.rounds]
        for other, rounds in measured.found.items()
    }
    begun = measured.found[case].begun
    others = {
        name: dataclasses.replace(case, stage=name) for name in ("plain", "eager")
    }
    if case.subject == "ours":
        others["class"] = dataclasses.replace(case, subject="class")
        others["timm"] = dataclasses.replace(case, subject="timm")
    step_ms = spread(times_ms[case])
    return {
        "step_ms": asdict(step_ms),
        "images_per_s": asdict(
            spread([1000 * case.batch_size / spent_ms for spent_ms in times_ms[case]])
        ),
        "mfu": mfu(
            1000 * case.batch_size / step_ms.median,
            macs=measured.sizes[case.model, case.subject].macs,
            rate=max(measured.rates[case.dtype].values()),
        ),
        "peak_mb": begun.peak_mb,
        # What the peak has over what is there between the steps.
        "step_mb": begun.peak_mb - begun.at_rest_mb,
        "to": {
            name: asdict(ratios(times_ms[other], times_ms[case]))
            for name, other in others.items()
            if other != case and other in times_ms
        },
    }


def mfu(images_per_s: float, *, macs: int, rate: float) -> float:
    """Compute the share of a rate that forward and backward use.

    A backward pass counts as two forward ones; recomputation by checkpointing does not
    count.
    """
    return 3 * 2 * macs * images_per_s / rate


def table(measured: Measured) -> str:
    """Format all cases by network, the matrix rates, and the load by others."""
    content, blocks = as_json(measured), []
    for networks in content["models"].values():
        for network in networks.values():
            rows = {stage: _row(of) for stage, of in network["stages"].items()}
            blocks.append(
                f"{network['name']}: {network['num_params'] / 1e6:.2f} M parameters, "
                f"{network['macs'] / 1e9:.2f} G multiply-adds\n"
                f"{pd.DataFrame(rows).T.to_string()}"
            )
    rates = {
        name: f"{max(of.values()) / 1e12:,.3f} TFLOP/s"
        for name, of in content["matrix_flops_per_s"].items()
    }
    others = [one.other_cores for of in measured.found.values() for one in of.rounds]
    return "\n".join(
        [*blocks, f"matrix products, measured here: {rates}", busy_text(others)]
    )


def _row(stage: Mapping[str, Any]) -> dict[str, str]:
    to = {name: f"{of['median']:.2f}" for name, of in stage["to"].items()}
    return {
        "ms a step": Spread(**stage["step_ms"]).shown(",.1f"),
        "images/s": f"{stage['images_per_s']['median']:,.1f}",
        "MFU": f"{stage['mfu']:.1%}",
        "peak MiB": f"{stage['peak_mb']:,.0f}",
        "of a step": f"{stage['step_mb']:,.0f}",
        **{
            f"x {name}": to.get(name, "")
            for name in ("plain", "eager", "class", "timm")
        },
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
