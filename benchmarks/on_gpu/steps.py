"""Time eager training steps stage by stage, beside timm's network of equal size."""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.model_cases import Case, Subject, size_of
from benchmarks.model_rounds import Begun, give_memory_back, tell
from benchmarks.on_gpu.rates import device_of
from benchmarks.on_gpu.stages import Figures, Setting, Tasks
from benchmarks.timing import spread

_CASES: tuple[tuple[Subject, str], ...] = (
    *(("ours", stage) for stage in ("channels_last", "bfloat16", "plain", "eager")),
    *(("timm", stage) for stage in ("channels_last", "plain")),
)
_TINY = (("depth", 1), ("embed_dim", 32), ("num_heads", 2))


def tasks(setting: Setting) -> Tasks:
    """Time ours and timm's by batch size."""
    cases = [
        case_of(setting, subject, stage, batch_size=batch_size)
        for batch_size in batch_sizes(setting)
        for subject, stage in _CASES
    ]
    return {name_of(case): functools.partial(_measure, setting, case) for case in cases}


def batch_sizes(setting: Setting) -> tuple[int, ...]:
    """Return the batch sizes: one that fills a GPU, and the papers' per GPU."""
    return setting.pick((256, 64), tiny=(2,))


def case_of(setting: Setting, subject: Subject, stage: str, *, batch_size: int) -> Case:
    """Return a case of So-ViT-14, or of a minimal So-ViT-7 in a tiny run."""
    return Case(
        model=setting.pick("so_vit_14", tiny="so_vit_7"),
        subject=subject,
        stage=stage,
        batch_size=batch_size,
        img_size=setting.pick(224, tiny=32),
        device=device_of(setting).type,
        num_threads=setting.num_threads,
        sizes=setting.pick((), tiny=_TINY),
    )


def name_of(case: Case) -> str:
    """Return the name of a case's task."""
    return f"{case.label}, {case.stage}, batch {case.batch_size}"


def clean_up(setting: Setting) -> None:
    """Free the memory of the case before: its model has reference cycles."""
    gc.collect()
    give_memory_back(device_of(setting))


def _measure(setting: Setting, case: Case) -> Figures:
    """Measure a case's first steps, and then rounds, in this process."""
    clean_up(setting)
    told = tell(case, round_s=setting.round_s)
    begun = next(told)
    rounds = [next(told) for _ in range(setting.num_rounds)]
    return figures_of(case, begun=begun, rounds=rounds)


def figures_of(
    case: Case, *, begun: Begun, rounds: Sequence[tuple[float, int]]
) -> Figures:
    """Return rate, times, arithmetic throughput, and memory."""
    of = spread([step_ms for step_ms, _ in rounds])
    images_per_s = 1000 * case.batch_size / of.median
    return {
        "images_per_s": images_per_s,
        "step_ms": of.median,
        "low_ms": of.low,
        "high_ms": of.high,
        # A backward pass counts as two forward ones.
        "tflop_per_s": 6 * size_of(case).macs * images_per_s / 1e12,
        "dtype": str(case.dtype).removeprefix("torch."),
        **asdict(begun),
    }
