"""Time a training step of our networks stage by stage, beside timm's of equal size.

    python -m benchmarks.model
    python -m benchmarks.model --model so_vit_7 --stages plain compile --json out.json

Stages: `plain` is the step as a script with timm does it, eager and, on a GPU, under
float16 autocast; `eager` is our loop's, in float32; `bfloat16`, `channels_last` and
`compile` follow, each on top of the one before; `checkpointing` is channels_last with
gradient checkpointing. Each with our second-order head, with the plain class-token head
instead, and of timm's ViT or DeiT whose parameters come nearest. All take turns.

MFU is 3 * 2 * multiply-adds * images/s over the rate of matrix products of the step's
type, measured in the same run: not a vendor's figure. Of memory "step" is what the peak
has over what is there between the steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pandas as pd
import torch

from benchmarks.model_cases import RIVALS, STAGES, Case, Subject
from benchmarks.model_steps import (
    kernels,
    matrix_rate,
    open_process,
    size_of,
    time_case,
)
from benchmarks.rounds import Frame, Record, ratios, run_rounds, shown_spread
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file
from pipelines.hardware.device import Wanted, find_device, has_bfloat16

_PROG = "benchmarks.model"
_BATCH_SIZES = {"cpu": 8, "cuda": 128}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and how long."""

    model: str = "so_vit_14"
    subjects: tuple[Subject, ...] = get_args(Subject)
    """ours; class: ours with the class-token head; timm: its network of equal size."""
    stages: tuple[str, ...] = tuple(STAGES)
    batch_size: int | None = None
    """By default 8 on a CPU and 128 on a GPU."""
    img_size: int = 224
    rounds: int = 3
    round_s: float = 0.5
    """A round of one case goes on for so long, or for one step."""
    num_threads: int = 2
    device: Wanted = "auto"
    json: Path | None = None
    """File for all figures."""
    profile: Path | None = None
    """File for the kernels of a step of each case."""

    def __post_init__(self) -> None:
        # timm's mixup takes pairs.
        batch_size = 2 if self.batch_size is None else self.batch_size
        for flag, value, known in (
            ("model", [self.model], RIVALS),
            ("stages", self.stages, STAGES),
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


def cases_of(options: Options) -> dict[str, Case]:
    """List the cases by name, without the stage bfloat16 if the device lacks it.

    Raises ValueError if that leaves no stage.
    """
    device = find_device(options.device)
    has_half = has_bfloat16(device)
    stages = [of for of in options.stages if of != "bfloat16" or has_half]
    if not stages:
        raise ValueError(
            f"expected a stage that {device.type} can do, got bfloat16, for which it "
            "has no instructions; set --stages"
        )
    cases = [
        Case(
            model=options.model,
            subject=subject,
            stage=stage,
            batch_size=options.batch_size or _BATCH_SIZES[device.type],
            img_size=options.img_size,
            device=device.type,
            num_threads=options.num_threads,
        )
        for subject in options.subjects
        for stage in stages
    ]
    return {f"{case.label}, {case.stage}": case for case in cases}


def mfu(images_per_s: float, *, macs: int, rate: float) -> float:
    """Compute the share of a rate that forward and backward use.

    A backward pass counts as two forward ones; recomputation by checkpointing does not
    count.
    """
    return 3 * 2 * macs * images_per_s / rate


def table(records: Frame, *, cases: Mapping[str, Case]) -> str:
    """Format a line per case, relative to others of the same round."""
    best = records.groupby("case", sort=False).max(numeric_only=True)
    rates = best.reindex(columns=["flops_per_s"])["flops_per_s"].dropna()
    timed = records[records["case"].isin(cases)]
    shown: dict[str, dict[str, str]] = {}
    for name, rounds in timed.groupby("case", sort=False):
        case = cases[name]
        size, row = size_of(case), rounds.iloc[-1]
        images_per_s = rounds["images_per_s"].median()
        rate = rates.get(_matrices(case.dtype), math.nan)
        shown[name] = {
            "M params": f"{size['num_params'] / 1e6:.2f}",
            "G MACs": f"{size['macs'] / 1e9:.2f}",
            "ms a step": shown_spread(rounds["step_ms"], ",.1f"),
            "images/s": f"{images_per_s:,.1f}",
            "MFU": f"{mfu(images_per_s, macs=size['macs'], rate=rate):.1%}",
            "peak MiB": f"{row['peak_mb']:,.0f}",
            "step": f"{row['peak_mb'] - row['at_rest_mb']:,.0f}",
            "first s": f"{row['first_step_s']:.1f}",
        }
        for of, other in _others(case, cases=cases).items():
            if other in timed["case"].values:
                ratio = ratios(timed, "images_per_s", to=other)[name]
                shown[name][f"x {of}"] = f"{ratio.median():.2f}"
    lines = pd.DataFrame(shown).T.fillna("").to_string()
    return f"{lines}\nmatrix products, FLOP/s: {rates.to_dict()}"


def _others(case: Case, *, cases: Mapping[str, Case]) -> dict[str, str]:
    """Name the cases that one is compared with: other stages, and ours with others."""
    found = {}
    for name, other in cases.items():
        if other.subject == case.subject and other.stage in ("plain", "eager"):
            found[other.stage] = name
        if case.subject == "ours" != other.subject and other.stage == case.stage:
            found[other.subject] = name
    return {of: name for of, name in found.items() if cases[name] != case}


def _matrices(dtype: torch.dtype) -> str:
    return f"products of matrices, {str(dtype).removeprefix('torch.')}"


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    check_file(options.profile, option="profile")
    torch.set_num_threads(options.num_threads)
    cases = cases_of(options)
    with contextlib.ExitStack() as stack:
        measures: dict[str, Callable[[], Record]] = {}
        pools = {
            case: stack.enter_context(open_process(case.device))
            for case in cases.values()
        }
        for case in cases.values():
            measures[_matrices(case.dtype)] = functools.partial(
                matrix_rate, case.dtype, device=case.device
            )
        for name, case in cases.items():
            measures[name] = functools.partial(
                time_case, pools[case], case, round_s=options.round_s
            )
        run_rounds(
            measures,
            num_rounds=options.rounds,
            options=options,
            path=options.json,
            table=functools.partial(table, cases=cases),
        )
        if options.profile is not None:
            parts = (
                f"{name}\n{pools[case].submit(kernels, case).result()}\n"
                for name, case in cases.items()
            )
            options.profile.write_text("\n".join(parts))


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
