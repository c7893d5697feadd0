"""Evaluate a checkpoint on shards: `sovit-eval CHECKPOINT SHARDS`.

    sovit-eval runs/demo-1/epoch_0008 /shards/val
    sovit-eval runs/demo-1/epoch_0008 /shards/val --weights raw --json result.json

One process and one device, without Ray; each image counts once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch
import tyro
from tqdm import tqdm

from pipelines.checkpoint import load_model
from pipelines.cli import parse, run_command
from pipelines.ingest.batch import Batch
from pipelines.ingest.decoder import decode_rows, make_decoder
from pipelines.ingest.feed import Shape, batches
from pipelines.ingest.footers import ShardSet, read_shard_set
from pipelines.ingest.plan import EpochPlan
from pipelines.ingest.prefetch import Prefetcher
from pipelines.ingest.reading import share_tables
from pipelines.ingest.stream import evaluation_plan
from pipelines.loop import LoopSettings, evaluate

_PROG = "sovit-eval"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what is evaluated, on what, and how."""

    checkpoint: tyro.conf.Positional[str]
    """Folder that sovit-train printed."""
    shards: tyro.conf.Positional[str]
    """Folder of shards, as sovit-shards writes them."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto takes the moving average where the checkpoint has one."""
    batch_size: int = 256
    decoder: Literal["auto", "dali", "torch"] = "auto"
    num_decode_threads: int = max((os.cpu_count() or 2) // 2, 1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: str = ""
    """File that the result is also written to."""


def evaluate_checkpoint(options: Options) -> dict[str, float]:
    """Evaluate a checkpoint on a shard set.

    Returns:
        loss, top1 and top5 (percent), and num_images.

    Raises ValueError where the checkpoint or the shards can't be used.
    """
    ema = {"auto": None, "ema": True, "raw": False}[options.weights]
    model, manifest = load_model(Path(options.checkpoint), ema=ema)
    shards = read_shard_set(options.shards)
    if shards.classes != manifest.classes:
        raise ValueError(
            f"wanted shards of the model's {len(manifest.classes)} classes, came "
            f"{options.shards!r} with {len(shards.classes)} others; write them with "
            "sovit-shards --classes of the training set"
        )
    device = torch.device(_device(options.device))
    data = dataclasses.replace(
        manifest.run.data,
        eval_batch_size=options.batch_size,
        decoder=options.decoder,
        num_decode_threads=options.num_decode_threads,
    )
    run = dataclasses.replace(manifest.run, data=data)
    plan = evaluation_plan(shards, data=data, epoch=0)
    decoder = make_decoder(
        data,
        img_size=run.model.img_size,
        batch_size=options.batch_size,
        train=False,
        device=device,
    )
    items = batches(
        _tables(plan, shards=shards),
        shape=Shape(share_rows=options.batch_size),
        decode=decode_rows(
            decoder, data=data, img_size=run.model.img_size, seed=run.seed, train=False
        ),
        device=device,
    )
    settings = LoopSettings(
        run=run,
        num_classes=len(shards.classes),
        steps_per_epoch=plan.num_batches,
        device=device,
    )
    prefetcher = Prefetcher(items, num_items=data.num_prefetch_batches, device=device)
    try:
        counted = _counted(prefetcher, num_images=plan.num_rows)
        model.to(device).to(memory_format=torch.channels_last)
        return evaluate(model, counted, settings=settings)
    finally:
        prefetcher.close()


def _tables(plan: EpochPlan, *, shards: ShardSet) -> Iterator[pa.Table]:
    for unit in plan.units():
        yield from share_tables(
            unit,
            address=shards.address,
            num_classes=len(shards.classes),
            num_workers=1,
        )


def _counted(batches: Prefetcher, *, num_images: int) -> Iterator[Batch]:
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
        f"loss {result['loss']:.4f}  {result['num_images']:,.0f} images counted"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


if __name__ == "__main__":
    main()
