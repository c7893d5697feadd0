"""Format an explanation of a run as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from pipelines.dry_run.explain import Explanation
from pipelines.dry_run.lr_plot import draw_text, rates
from pipelines.dry_run.progress_left import SetFacts
from pipelines.dry_run.timing import EXPECTED_SHARE, Timed
from pipelines.storage.redaction import without_credentials
from pipelines.training.model import title_of
from pipelines.training.optimizer import learning_rate

_LABEL_CHARS = 11
_WIDTH = 76
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_RATE_TOLD = 100e12
_MINUTES_PER_HOUR = 60
_NUM_LOOKED_AT = 2000


def as_text(found: Explanation, *, is_plain: bool = False) -> str:
    """Format an explanation as lines for a terminal; in ASCII if plain."""
    lines = [
        f"dry run of {found.run.recipe}: nothing is started",
        "",
        *_section("model", _model(found)),
        *_section("data", filter(None, [_set(found.train), found.balance])),
        *_section("held out", _held_out(found)),
        *_section("steps", _steps(found)),
        *_section("rate", _rate(found)),
        "",
        draw_text(
            found.run.optim,
            steps_per_epoch=found.course.steps_per_epoch,
            is_plain=is_plain,
        ),
        "",
        *_section("memory", _memory(found)),
        *_section("time", _time(found)),
        *_section("places", _places(found)),
        *_section("warnings", _warnings(found)),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _section(label: str, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield f"{label:<{_LABEL_CHARS}} {line}"
        label = ""


def size_text(num_bytes: float) -> str:
    """Format a number of bytes in a fitting unit, such as 98.9 MB."""
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes:.0f} B"


def hours_text(hours: float) -> str:
    """Format a duration in hours, or in minutes below one hour."""
    if hours < 1:
        return f"{hours * _MINUTES_PER_HOUR:.2g} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def _model(found: Explanation) -> Iterator[str]:
    parameters, size = found.parameters, found.run.model.img_size
    name = title_of(found.run.model)
    yield f"{name}, {size}x{size} pixels, {found.num_classes:,} classes"
    is_all = parameters.num == parameters.num_trained
    trained = "all" if is_all else f"{parameters.num_trained:,}"
    yield f"{parameters.num:,} parameters, {trained} trained"
    width = max(len(name) for name in parameters.groups)
    for name, num in parameters.groups.items():
        yield f"  {name:<{width}} {num:>13,} {100 * num / parameters.num:5.1f} %"
    macs, training_macs = found.macs / 1e9, found.training_macs / 1e9
    yield f"{macs:.3g} G multiply-adds an image, {training_macs:.3g} G to train on it"
    if found.run.model.init_from and not found.places.goes_on_from:
        yield f"starts from {without_credentials(found.run.model.init_from)}"


def _set(facts: SetFacts) -> str:
    return (
        f"{facts.num_images:,} images in {facts.num_shards:,} shards, "
        f"{size_text(facts.num_bytes)}: {facts.address}"
    )


def _held_out(found: Explanation) -> Iterator[str]:
    if not found.run.validation.held_out:
        yield "none: nothing is evaluated (--validation.no-held-out)"
        return
    for name, facts in found.held_out.items():
        yield f"{name}: {_set(facts)}" if name else _set(facts)
    every = found.run.validation.every_epochs
    often = "every epoch" if every == 1 else f"every {every} epochs"
    yield f"evaluated {often}, and after the last"


def _steps(found: Explanation) -> Iterator[str]:
    run, course = found.run, found.course
    yield (
        f"{course.num_steps:,} in {run.optim.total_epochs:,} epochs of "
        f"{course.steps_per_epoch:,}, of {run.data.batch_size:,} images; an epoch's "
        f"last of {course.last_batch_size:,}"
    )
    scale = run.scale
    num_micro = run.num_micro(scale.world_size)
    where = "this process" if scale.is_local else _count(scale.world_size, "worker")
    yield (
        f"{where} on {'a GPU each' if scale.use_gpu else 'CPUs'}, "
        f"{_count(num_micro, 'micro-batch')} of {run.micro_batch_size:,} images"
    )
    settings = {
        "compiled": scale.wants_compile,
        "activations computed again": scale.grad_checkpointing,
        f"weights shared out by {scale.sharding}": scale.sharding != "none",
    }
    if chosen := [name for name, is_on in settings.items() if is_on]:
        yield ", ".join(chosen)
    if course.num_steps_done:
        left = course.num_steps - course.num_steps_done
        yield f"{course.num_steps_done:,} are done, {left:,} are left"


def _count(num: int, name: str) -> str:
    plural = "es" if name.endswith("ch") else "s"
    return f"{num:,} {name}{'' if num == 1 else plural}"


def _rate(found: Explanation) -> Iterator[str]:
    optim, num_steps = found.run.optim, found.course.steps_per_epoch
    warm = f", the first {optim.warmup_epochs:g} epochs a warm-up"
    yield (
        f"{optim.optimizer}; {optim.schedule.kind} over {optim.num_epochs:,} epochs"
        f"{warm if optim.warmup_epochs else ''}"
    )
    last = optim.total_epochs * num_steps - 1
    first, end = (
        learning_rate(step, optim=optim, steps_per_epoch=num_steps)
        for step in (0, last)
    )
    most = max(rates(optim, steps_per_epoch=num_steps, num_points=_NUM_LOOKED_AT))
    yield (
        f"{first:.3g} in the first step, {max(most, first):.3g} at most, {end:.3g} in "
        "the last"
    )


def _memory(found: Explanation) -> Iterator[str]:
    yield "of one worker, beside what Python, PyTorch and Ray take themselves"
    memory, run = found.memory, found.run
    if memory is None:
        yield f"not known, since a step looks at values: {found.why_no_memory}"
        return
    kind = "bfloat16" if found.is_bfloat16 else "float32"
    notes = {
        "weights": ""
        if run.scale.sharding == "none"
        else "its part, and for a while a block's whole ones beside it",
        "gradients": "",
        "optimizer": f"{run.optim.optimizer}'s state",
        "average": "" if run.optim.ema_decay else "none is kept",
        "activations": f"of {run.micro_batch_size:,} images in {kind}, as a CPU keeps "
        "them",
        "passing": "more at the peak of the two passes",
        "batches": "decoded images that wait",
    }
    if run.scale.use_gpu:
        notes |= {
            "context": "of CUDA and its libraries: assumed, not measured",
            "nccl": "to talk to other GPUs: assumed, not measured",
            "dali": "its pools and nvJPEG's: an estimate",
        }
    for name, note in notes.items():
        yield f"  {name:<12} {size_text(getattr(memory, name)):>9}  {note}"
    yield f"  {'total':<12} {size_text(memory.total):>9}  if all come at the same time"


def _time(found: Explanation) -> Iterator[str]:
    timed, run = found.timed, found.run
    course = found.course
    yield (
        f"{found.flops_left:.2e} FLOPs: {course.num_images_left:,} images to train on, "
        f"{course.num_evaluated_left:,} to evaluate"
    )
    workers = _count(run.scale.world_size, "worker")
    if timed is None:
        yield (
            f"{hours_text(found.hours(_RATE_TOLD))} if each of {workers} does 100 "
            "TFLOP/s; there is no GPU here to"
        )
        yield "time it on, and hours fall as that rate rises"
        return
    matrices = f"{timed.matrix_rate / 1e9:,.0f} GFLOP/s that matrices reach"
    if not timed.batch_size:
        share = EXPECTED_SHARE
        yield (
            f"{hours_text(found.hours(share * timed.matrix_rate))} if steps do "
            f"{share:.0%} of the {matrices} here:"
        )
        yield "an assumption, since a step takes too long, or too much memory, to time"
        return
    rate = 2 * found.training_macs * timed.images_per_s
    yield (
        f"{hours_text(found.hours(rate))}: steps of {timed.batch_size:,} random images "
        f"do {timed.images_per_s:,.1f} images/s here, on {_place(timed)}"
    )
    yield f"that is {rate / 1e9:,.0f} of the {matrices}; {workers} of that rate,"
    yield "without reading and decoding images, and eager"


def _place(timed: Timed) -> str:
    return "a GPU" if timed.device != "cpu" else _count(timed.num_threads, "thread")


def _places(found: Explanation) -> Iterator[str]:
    places, num_kept = found.places, found.run.num_checkpoints_to_keep
    each = places.checkpoint_bytes
    yield f"checkpoints  {places.folder}"
    yield (
        f"             {size_text(each)} each; the last {num_kept} and the best kept, "
        f"{size_text(places.num_checkpoints * each)} at most"
    )
    if places.goes_on_from is not None:
        newest = places.goes_on_from or "the beginning: no checkpoint is there yet"
        yield f"             goes on from {newest}"
    yield f"MLflow       {places.mlflow}, experiment {found.run.experiment}"


def _warnings(found: Explanation) -> Iterator[str]:
    for warning in found.warnings:
        yield from textwrap.wrap(warning, _WIDTH, subsequent_indent="  ")
    if not found.warnings:
        yield "none"
