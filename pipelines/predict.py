"""Classify images: `sovit-predict CHECKPOINT IMAGE...`.

    sovit-predict runs/demo-1/epoch_0008 photo.jpg more_photos
    sovit-predict runs/demo-1/epoch_0008 shards/val --num-top 1 --json answers.json
    sovit-predict exported photo.jpg

Images are files, folders of them or shards, prepared as in evaluation. CHECKPOINT may
be a folder that sovit-export or timm's save_for_hf wrote. An image that does not decode
costs that image, by name; the others are answered, and the exit status is 1.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from pipelines.checkpoints.manifest import load_model_code
from pipelines.checkpoints.snapshot import MANIFEST
from pipelines.cli.command import fail, parse, run_command
from pipelines.cli.outputs import check_file
from pipelines.export.images import Encoded, decode, read_images
from pipelines.export.subject import Subject, Weights, from_checkpoint
from pipelines.export.timm_folder import CONFIG, read_timm
from pipelines.hardware.device import Wanted, find_device, upload
from pipelines.training.step import Forward
from pipelines.transforms.headers import BadImageError

logger = logging.getLogger(__name__)
_PROG = "sovit-predict"
_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which model answers, on which images, and how."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or bucket address that sovit-train printed, or a folder of sovit-export
    or of timm's save_for_hf."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or shards, here or in a bucket."""
    weights: Weights = "auto"
    """auto takes the moving average where the checkpoint has one."""
    num_top: int = 5
    """Classes that are named for each image."""
    code: str = ""
    """Recipe file that registers the checkpoint's model, where that is your own and the
    run is none that you trained here; it is run."""
    device: Wanted = "auto"
    json: str = ""
    """File that the answers are also written to; - prints them alone."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An image's most probable classes, or why it can't be classified."""

    image: str
    top: tuple[tuple[str, float], ...] = ()
    """Classes and their probabilities, the most probable first."""
    reason: str = ""


def load_subject(address: str, *, weights: Weights = "auto") -> Subject:
    """Load a checkpoint, or a folder that sovit-export or timm's save_for_hf wrote.

    Raises ValueError where it is neither, or it is damaged.
    """
    folder = Path(address)
    if (folder / MANIFEST).is_file() or not (folder / CONFIG).is_file():
        return from_checkpoint(address, weights=weights)
    if weights != "auto":
        raise ValueError(
            f"weights: expected auto for an exported folder, got {weights!r}; say "
            "which to sovit-export"
        )
    return read_timm(folder)


def predict(
    subject: Subject,
    images: Iterable[Encoded],
    *,
    num_top: int = 5,
    device: torch.device | None = None,
) -> Iterator[Answer]:
    """Classify images in batches of 32, yielding answers in their order."""
    device = device or torch.device("cpu")
    subject.model.to(device)
    batch: list[Encoded] = []
    for image in images:
        batch.append(image)
        if len(batch) == _BATCH_SIZE:
            yield from _answers(subject, batch, num_top=num_top, device=device)
            batch = []
    yield from _answers(subject, batch, num_top=num_top, device=device)


def _answers(
    subject: Subject, batch: Sequence[Encoded], *, num_top: int, device: torch.device
) -> Iterator[Answer]:
    pixels: dict[int, Tensor] = {}
    reasons: dict[int, str] = {}
    for at, image in enumerate(batch):
        try:
            pixels[at] = decode(image, data=subject.data, img_size=subject.img_size)
        except BadImageError as error:
            reasons[at] = str(error)
    tops: dict[int, tuple[tuple[str, float], ...]] = {}
    if pixels:
        stacked = upload(torch.stack(list(pixels.values())), device)
        found = _top(subject, stacked, num_top=num_top)
        tops = dict(zip(pixels, found, strict=True))
    for at, image in enumerate(batch):
        reason = reasons.get(at, "")
        yield Answer(image=image.name, top=tops.get(at, ()), reason=reason)


@torch.inference_mode()
def _top(
    subject: Subject, pixels: Tensor, *, num_top: int
) -> list[tuple[tuple[str, float], ...]]:
    # In float32 on every device, as an exported model computes.
    forward = Forward(device=pixels.device, amp="off", mirror=subject.data.eval_mirror)
    logits = forward(subject.model, pixels)
    classes = subject.classes
    top = logits.float().softmax(dim=-1).topk(min(num_top, len(classes)))
    return [
        tuple((classes[place], score) for place, score in zip(*of_image, strict=True))
        for of_image in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _as_json(answers: Sequence[Answer], *, names: Mapping[str, str]) -> str:
    def row(answer: Answer) -> dict[str, Any]:
        if answer.reason:
            return {"image": answer.image, "reason": answer.reason}
        top = [
            {
                "class": label,
                **({"name": names[label]} if names else {}),
                "probability": score,
            }
            for label, score in answer.top
        ]
        return {"image": answer.image, "top": top}

    return json.dumps([row(answer) for answer in answers], indent=2)


def _print_answer(answer: Answer, *, names: Mapping[str, str]) -> None:
    print(answer.image)
    for label, score in answer.top:
        name = f"  {names[label]}" if names else ""
        print(f"  {100 * score:6.2f} %  {label}{name}")


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    if not options.images or options.num_top < 1:
        raise ValueError(
            f"expected images and num_top of at least 1, got {len(options.images)} and "
            f"{options.num_top}; name files, folders or shards"
        )
    if options.json != "-":
        check_file(options.json, option="json")
    load_model_code(options.checkpoint, given=options.code)
    subject = load_subject(options.checkpoint, weights=options.weights)
    names = subject.names
    answers: list[Answer] = []
    for answer in predict(
        subject,
        read_images(options.images),
        num_top=options.num_top,
        device=find_device(options.device),
    ):
        answers.append(answer)
        if answer.reason:
            logger.warning("%s left out: %s", answer.image, answer.reason)
        elif options.json != "-":
            _print_answer(answer, names=names)
    if options.json == "-":
        print(_as_json(answers, names=names))
    elif options.json:
        Path(options.json).write_text(_as_json(answers, names=names) + "\n")
    num_bad = sum(bool(answer.reason) for answer in answers)
    if num_bad:
        fail(f"{_PROG}: {num_bad} of {len(answers)} images left out", status=1)


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


if __name__ == "__main__":
    main()
