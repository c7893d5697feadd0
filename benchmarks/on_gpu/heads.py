"""Time second-order heads beside the straightforward, and their share of a step."""

from __future__ import annotations

import functools
import itertools

import torch

from benchmarks import straightforward as plain
from benchmarks.head_cases import Case, cases
from benchmarks.head_rounds import compare
from benchmarks.on_gpu.rates import device_of, times_ms
from benchmarks.on_gpu.stages import Figures, Setting, Tasks
from benchmarks.step_share import measure_share
from sovit.newton_schulz import newton_schulz_sqrt

_STEPS = ("so_vit_14", "isqrt_resnet50", "mpncov_resnet50")
_TINY = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
_SIDES = (64, 128, 256)


def tasks(setting: Setting) -> Tasks:
    """Measure the shares, the products in TF32, and each head of `benchmarks.heads`."""
    batch_size = setting.pick(64, tiny=1)
    heads = cases(batch_size, device=device_of(setting).type)
    names = setting.pick(_STEPS, tiny=("so_vit_7",))
    return {
        **{f"share of {it}": functools.partial(_share, setting, it) for it in names},
        **{
            f"Newton-Schulz, {side}x{side}, {precision}": functools.partial(
                _root, setting, side, precision=precision
            )
            for side, precision in itertools.product(_SIDES, ("float32", "tf32"))
        },
        **{
            case.name: functools.partial(_compare, setting, case)
            for case in heads[:: setting.pick(1, tiny=4)]
        },
    }


def _share(setting: Setting, name: str) -> Figures:
    found = measure_share(
        name,
        batch_size=setting.pick(64, tiny=2),
        device=device_of(setting).type,
        img_size=setting.pick(224, tiny=32),
        settings=setting.pick({}, tiny=_TINY),
    )
    return {
        "dtype": found.dtype,
        "step_ms": found.step_ms,
        "head_ms": found.head_ms,
        "pooling_ms": found.pooling_ms,
        "head_share": found.head_ms / found.step_ms,
    }


def _compare(setting: Setting, case: Case) -> Figures:
    found = compare(
        case,
        num_rounds=setting.num_rounds,
        round_s=setting.round_s / 4,
        compiled=False,
        device=device_of(setting).type,
    )
    return {
        "ours_ms": found.ours_ms.median,
        "plain_ms": found.straightforward_ms.median,
        "times_as_fast": found.speedup.median,
        "kept": found.ours_kept,
    }


def _root(setting: Setting, side: int, *, precision: str) -> Figures:
    """Time forward and backward, and measure the error against float64."""
    matrices = Case(
        name="",
        ours=newton_schulz_sqrt,
        straightforward=plain.newton_schulz,
        shape=(setting.pick(64, tiny=1), 196, side),
        of_matrix=True,
    ).input(device_of(setting).type)
    exact = plain.newton_schulz(matrices.cpu().double())
    leaf = matrices.requires_grad_()

    def both() -> None:
        newton_schulz_sqrt(leaf).sum().backward()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        found = newton_schulz_sqrt(matrices).detach().cpu().double()
        spent = times_ms(both, setting=setting)
    finally:
        torch.set_float32_matmul_precision(before)
    error = float((found - exact).norm() / exact.norm())
    return {"ms": spent.median, "relative_error": error}
