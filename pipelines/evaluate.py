"""Evaluate a checkpoint on shards: `sovit-eval CHECKPOINT SHARDS`.

    sovit-eval runs/demo-1/epoch_0008 /shards/val
    sovit-eval runs/demo-1/epoch_0008 /shards/val --weights raw --json result.json
    sovit-eval runs/demo-1/epoch_0008 /shards/val --corruptions --plot errors.png
    sovit-eval runs/demo-1/epoch_0008 /shards/val --corruptions fog --severities 1 3
    sovit-eval runs/demo-1/epoch_0008 /shards/val --perturbations --num-frames 5

One process and one device, without Ray; each image counts once. Corruptions and
perturbations are those of ImageNet-C and ImageNet-P, made on the fly.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from tqdm import tqdm

from pipelines.checkpoint import load_model, opened
from pipelines.cli import parse, run_command
from pipelines.config import Run
from pipelines.ingest.batch import Batch
from pipelines.ingest.footers import ShardSet, read_shard_set
from pipelines.loop import LoopSettings, check_bad_share, evaluate
from pipelines.pixels.rows import BadImage
from pipelines.robustness import report
from pipelines.robustness.measure import Subject, measure
from pipelines.robustness.options import Flat, Robustness
from pipelines.supply import opened_here

logger = logging.getLogger(__name__)
_PROG = "sovit-eval"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what is evaluated, on what, and how."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or bucket address that sovit-train printed."""
    shards: tyro.conf.Positional[str]
    """Folder or bucket of shards, as sovit-shards writes them."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto takes the moving average where the checkpoint has one."""
    batch_size: int = 256
    decoder: Literal["auto", "dali", "torch"] = "auto"
    num_decode_threads: int = max((os.cpu_count() or 2) // 2, 1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: str = ""
    """File that the result is also written to."""
    robustness: Flat = field(default_factory=Robustness)


def evaluate_checkpoint(options: Options) -> dict[str, Any]:
    """Evaluate a checkpoint on a shard set.

    Returns:
        loss, top1 and top5 (percent), num_images, and num_bad, the images that can't
        be decoded; and where they are asked for `corruptions` and `perturbations`, see
        `pipelines.robustness.measure`.

    Raises ValueError where the checkpoint or the shards can't be used.
    """
    options.robustness.check()
    ema = {"auto": None, "ema": True, "raw": False}[options.weights]
    with opened(options.checkpoint) as folder:
        model, manifest = load_model(folder, ema=ema)
    shards = read_shard_set(options.shards)
    if shards.classes != manifest.classes:
        raise ValueError(
            f"wanted shards of the model's {len(manifest.classes)} classes, came "
            f"{options.shards!r} with {len(shards.classes)} others; write them with "
            "sovit-shards --classes of the training set"
        )
    device = torch.device(_device(options.device))
    model.to(device).to(memory_format=torch.channels_last)
    run = _evaluated(manifest.run, options=options)
    settings = LoopSettings(
        run=run,
        num_classes=len(shards.classes),
        steps_per_epoch=1,
        images_per_epoch=shards.groups.total_rows,
        device=device,
    )
    result: dict[str, Any] = _clean(model, shards=shards, settings=settings)
    if options.robustness.is_wanted:
        subject = Subject(
            model=model,
            settings=settings,
            open_batches=lambda run: opened_here(shards, run=run, device=device),
        )
        clean_error = 100 - result["top1"]
        result |= measure(subject, options=options.robustness, clean_error=clean_error)
    return result


def _evaluated(run: Run, *, options: Options) -> Run:
    data = dataclasses.replace(
        run.data,
        eval_batch_size=options.batch_size,
        decoder=options.decoder,
        num_decode_threads=options.num_decode_threads,
        decode_on="workers",
    )
    return dataclasses.replace(run, data=data)


def _clean(
    model: nn.Module, *, shards: ShardSet, settings: LoopSettings
) -> dict[str, float]:
    """Evaluate on the images as they are; name those that can't be decoded."""
    run, num_images = settings.run, settings.images_per_epoch
    bad: list[BadImage] = []
    try:
        with opened_here(
            shards, run=run, device=settings.device, on_bad=bad.extend
        ) as batches:
            counted = _counted(batches, num_images=num_images)
            result = evaluate(model, counted, settings=settings)
    finally:
        for image in bad:
            shard = shards.groups.path_of(image.row_id)
            logger.warning("%s of %s left out: %s", image.key, shard, image.reason)
    check_bad_share(
        round(result["num_bad"]),
        num_images=num_images,
        max_share=run.data.max_bad_share,
    )
    return result


def _counted(batches: Iterable[Batch], *, num_images: int) -> Iterator[Batch]:
    """Show progress with rate and time left; a bar is only drawn in a terminal."""
    with tqdm(total=num_images, unit="image", disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(batch.global_rows)


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    result = evaluate_checkpoint(options)
    print(
        f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  "
        f"loss {result['loss']:.4f}  {result['num_images']:,.0f} images counted, "
        f"{result['num_bad']:,.0f} left out"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    if options.robustness.is_wanted:
        print(report.table(result))
    if options.robustness.plot:
        path = Path(options.robustness.plot)
        report.draw(result, path=path)
        print(f"picture  {path}")


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


if __name__ == "__main__":
    main()
