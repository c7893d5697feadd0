"""Work out and show what the rounds of `benchmarks.model` gave."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.model_cases import Case, Size, Subject
from benchmarks.model_rounds import Rounds
from benchmarks.timing import Spread, ratios, spread

Rates = Mapping[torch.dtype, Mapping[int, float]]
"""FLOP/s of matrix products, by type and side."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Hold what one run of the benchmark measured, and what it counted."""

    found: Mapping[Case, Rounds]
    sizes: Mapping[tuple[str, str], Size]
    """By model and subject."""
    rates: Rates
    """The best of all rounds."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Hold what one stage of one network gave."""

    step_ms: Spread
    images_per_s: Spread
    mfu: float
    """At the median."""
    peak_mb: float
    step_mb: float
    """What the peak has over what is there between the steps."""
    to: Mapping[str, Spread]
    """How often as fast as the same network's `plain` and `eager`, and as `class` and
    `timm` at the same stage, round by round."""


def results_of(measured: Measured) -> dict[Case, Result]:
    """Work out what is shown of the rounds."""
    found, sizes = measured.found, measured.sizes
    times_ms = {
        case: [one.step_ms for one in rounds.rounds] for case, rounds in found.items()
    }
    best = {dtype: max(of.values()) for dtype, of in measured.rates.items()}
    return {
        case: Result(
            step_ms=spread(times_ms[case]),
            images_per_s=spread([1000 * case.batch_size / t for t in times_ms[case]]),
            mfu=mfu(
                1000 * case.batch_size / statistics.median(times_ms[case]),
                macs=sizes[case.model, case.subject].macs,
                rate=best[case.dtype],
            ),
            peak_mb=rounds.begun.peak_mb,
            step_mb=rounds.begun.peak_mb - rounds.begun.at_rest_mb,
            to={
                name: ratios(times_ms[other], times_ms[case])
                for name, other in _others(case).items()
                if other != case and other in times_ms
            },
        )
        for case, rounds in found.items()
    }


def _others(case: Case) -> dict[str, Case]:
    """Name the cases that one is compared with."""
    stages = {s: dataclasses.replace(case, stage=s) for s in ("plain", "eager")}
    if case.subject != "ours":
        return stages
    subjects: tuple[Subject, ...] = ("class", "timm")
    return stages | {s: dataclasses.replace(case, subject=s) for s in subjects}


def mfu(images_per_s: float, *, macs: int, rate: float) -> float:
    """Give the share of a rate that forward and backward make use of.

    A backward pass counts as two forward ones; what checkpointing does again does not
    count.
    """
    return 3 * 2 * macs * images_per_s / rate


def table(results: Mapping[Case, Result], *, measured: Measured) -> str:
    """Draw all cases, network by network."""
    lines = []
    networks = itertools.groupby(results, key=lambda case: (case.model, case.label))
    for (_, label), of_network in networks:
        cases = list(of_network)
        first = cases[0]
        size = measured.sizes[first.model, first.subject]
        lines.append(
            f"{label}: {size.num_params / 1e6:.2f} M parameters, "
            f"{size.macs / 1e9:.2f} G multiply-adds, batch {first.batch_size}, "
            f"{first.img_size} px, {first.device}"
        )
        lines.append(
            f"  {'':<14}{'ms a step':>28}{'images/s':>9}{'x plain':>9}{'x eager':>9}"
            f"{'MFU':>7}{'peak MiB':>10}{'of a step':>10}{'x class':>9}{'x timm':>9}"
        )
        lines += [_row(case, results[case]) for case in cases]
    return "\n".join(lines)


def _row(case: Case, result: Result) -> str:
    step = result.step_ms
    shown = f"{step.median:,.1f} [{step.low:,.1f}..{step.high:,.1f}]"
    to = {name: f"{of.median:.2f}" for name, of in result.to.items()}
    return (
        f"  {case.stage:<14}{shown:>28}{result.images_per_s.median:>9,.1f}"
        f"{to.get('plain', ''):>9}{to.get('eager', ''):>9}{result.mfu:>7.1%}"
        f"{result.peak_mb:>10,.0f}{result.step_mb:>10,.0f}"
        f"{to.get('class', ''):>9}{to.get('timm', ''):>9}"
    )


def rates_text(rates: Rates) -> str:
    """Say what matrix products reach here."""
    shown = []
    for dtype, of_side in rates.items():
        side = max(of_side, key=lambda side: of_side[side])
        rate = of_side[side] / 1e12
        shown.append(f"{_name(dtype)} {rate:,.3f} TFLOP/s (side {side})")
    return f"matrix products, measured here: {', '.join(shown)}"


def others_text(measured: Measured) -> str:
    """Say how busy the machine was with other things."""
    others = [one.other_cores for of in measured.found.values() for one in of.rounds]
    return (
        f"meanwhile the rest of the machine was busy on {statistics.median(others):.2f}"
        f" cores, at most {max(others):.2f}"
    )


def as_json(results: Mapping[Case, Result], *, measured: Measured) -> dict[str, Any]:
    """Give all rounds, and what the table shows of them."""
    models: dict[str, Any] = {}
    for case, result in results.items():
        size = asdict(measured.sizes[case.model, case.subject])
        network = models.setdefault(case.model, {}).setdefault(
            case.subject, {"name": case.label, **size, "stages": {}}
        )
        network["stages"][case.stage] = {
            "dtype": _name(case.dtype),
            **asdict(result),
            **asdict(measured.found[case]),
        }
    rates = {_name(dtype): dict(of) for dtype, of in measured.rates.items()}
    return {"matrix_flops_per_s": rates, "models": models}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
