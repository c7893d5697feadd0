"""Time a training step of our networks stage by stage, beside timm's of equal size.

    python -m benchmarks.model
    python -m benchmarks.model --models so_vit_14 --stages plain compile --json out.json

Stages: `plain` is the step as a script with timm does it, eager and, on a GPU, under
float16 autocast; `eager` is our loop's, in float32; `bfloat16`, `channels_last` and
`compile` follow, each on top of the one before; `checkpointing` is channels_last with
gradient checkpointing. Each with our second-order head, with the plain class-token head
instead, and of timm's ViT or DeiT whose parameters come nearest. Rounds of all take
turns.

MFU is 3 * 2 * multiply-adds * images/s over the rate of matrix products of the step's
type, measured in the same run: not a vendor's figure.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.machine import busy_text, machine
from benchmarks.model_cases import (
    RIVALS,
    STAGES,
    SUBJECTS,
    Case,
    Size,
    Subject,
    size_of,
)
from benchmarks.model_rounds import Rounds, matrix_rates, time_cases
from benchmarks.result_file import write_result
from benchmarks.timing import Spread, ratios, spread
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file
from pipelines.hardware.device import has_bfloat16

_PROG = "benchmarks.model"
_BATCH_SIZES = {"cpu": 8, "cuda": 128}


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


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and how long."""

    models: tuple[str, ...] = ("so_vit_7", "so_vit_14")
    subjects: tuple[Subject, ...] = SUBJECTS
    """ours; class: ours with the class-token head; timm: its network of equal size."""
    stages: tuple[str, ...] = tuple(STAGES)
    batch_size: int | None = None
    """By default 8 on a CPU and 128 on a GPU."""
    img_size: int = 224
    rounds: int = 3
    round_s: float = 0.5
    """A round of one case goes on for so long, or for one step."""
    num_threads: int = 2
    device: str = "auto"
    """auto, cpu or cuda."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        # timm's mixup takes pairs.
        batch_size = 2 if self.batch_size is None else self.batch_size
        has_gpu = torch.cuda.is_available()
        for flag, value, known in (
            ("models", self.models, RIVALS),
            ("stages", self.stages, STAGES),
            ("device", [self.device], ["auto", "cpu", *["cuda"] * has_gpu]),
        ):
            if not value or not set(value) <= set(known):
                raise ValueError(
                    f"expected {flag} of {list(known)}, got {list(value)}; set --{flag}"
                )
        if self.rounds < 1 or batch_size < 2 or batch_size % 2:
            raise ValueError(
                "expected a round at least and an even batch size, got "
                f"{self.rounds} and {batch_size}; set --rounds or --batch-size"
            )


def cases_of(model: str, *, options: Options) -> list[Case]:
    """List a model's cases, without the stage bfloat16 if the device lacks it.

    Raises ValueError if that leaves no stage.
    """
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = [
        stage
        for stage in options.stages
        if stage != "bfloat16" or has_bfloat16(torch.device(device))
    ]
    if not stages:
        raise ValueError(
            f"expected a stage that {device} can do, got bfloat16, for which it has no "
            "instructions; set --stages"
        )
    return [
        Case(
            model=model,
            subject=subject,
            stage=stage,
            batch_size=options.batch_size or _BATCH_SIZES[device],
            img_size=options.img_size,
            device=device,
            num_threads=options.num_threads,
        )
        for subject in options.subjects
        for stage in stages
    ]


def measure(
    cases: Sequence[Case], *, options: Options, save: Callable[[Measured], None]
) -> None:
    """Time all cases, and the rates of matrix products in between.

    Args:
        save: Callback with all measurements, after each round of each case.
    """
    device, dtypes = cases[0].device, list(dict.fromkeys(it.dtype for it in cases))
    rates: dict[torch.dtype, dict[int, float]] = {dtype: {} for dtype in dtypes}
    # Of each network once: all its stages are of one size.
    networks = {(case.model, case.subject): case for case in cases}
    sizes = {name: size_of(case) for name, case in networks.items()}

    def measure_rates() -> None:
        for dtype, of_side in matrix_rates(dtypes, device=device).items():
            for side, rate in of_side.items():
                rates[dtype][side] = max(rate, rates[dtype].get(side, 0.0))

    found: dict[Case, Rounds] = {}

    def note(rounds: Mapping[Case, Rounds]) -> None:
        found.update(rounds)
        save(Measured(found=found, sizes=sizes, rates=rates))

    # One model after the other: its processes hold memory while they wait.
    for _, of_model in itertools.groupby(cases, key=lambda case: case.model):
        time_cases(
            list(of_model),
            num_rounds=options.rounds,
            round_s=options.round_s,
            between=measure_rates,
            on_round=note,
        )


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    torch.set_num_threads(options.num_threads)
    cases = [
        case for name in options.models for case in cases_of(name, options=options)
    ]
    about = {
        "machine": machine(),
        "options": str(dataclasses.replace(options, json=None)),
        "device": cases[0].device,
        "batch_size": cases[0].batch_size,
        "stages": {name: STAGES[name].adds for name in options.stages},
    }
    last: list[Measured] = []

    def missing() -> list[str]:
        found = last[-1].found if last else {}
        return [f"{it.label}, {it.stage}" for it in cases if it not in found]

    def save(measured: Measured) -> None:
        last[:] = [measured]
        write_result(options.json, {**about, **as_json(measured)}, missing=missing())

    try:
        measure(cases, options=options, save=save)
    finally:
        if last:
            print(table(last[0]))
        if left := missing():
            print(f"not measured: {'; '.join(left)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
