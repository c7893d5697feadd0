"""Evaluate a checkpoint on shards: `sovit-eval CHECKPOINT SHARDS`.

    sovit-eval runs/demo-1/epoch_0008 /shards/val
    sovit-eval runs/demo-1/epoch_0008 /shards/val --weights raw --json result.json
    sovit-eval runs/demo-1/epoch_0008 /shards/val --weights both --report report
    sovit-eval runs/NAME/epoch_0300 /shards/val --real-labels real.json \\
      --also v2=/shards/imagenet_v2 a=/shards/imagenet_a
    sovit-eval runs/demo-1/epoch_0008 /shards/val --corruptions --plot errors.png
    sovit-eval runs/demo-1/epoch_0008 /shards/val --corruptions fog --severities 1 3
    sovit-eval runs/demo-1/epoch_0008 /shards/val --perturbations --num-frames 5

One process and one device, without Ray; each image counts once. Of a set with some of
the model's classes the model chooses among these. Corruptions and perturbations are
those of ImageNet-C and ImageNet-P, made on the fly.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
import tyro
from torch import nn

from pipelines.checkpoints.manifest import Manifest, load_model, load_model_code, opened
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_file, check_folder
from pipelines.config import Run, named_addresses
from pipelines.data.loader import opened_here
from pipelines.data.shard_set import read_shard_set
from pipelines.evaluation.checkpoint import here, load_models, measure_set, named
from pipelines.evaluation.figures import write_report
from pipelines.evaluation.held_out import HeldOut, held_out
from pipelines.evaluation.measure import EvaluationResult, narrowed
from pipelines.hardware.device import Wanted, find_device
from pipelines.robustness import report
from pipelines.robustness.measure import Subject, measure
from pipelines.robustness.options import Flat, Robustness
from pipelines.storage.redaction import without_credentials
from pipelines.transforms.rows import BadImage

logger = logging.getLogger(__name__)
_PROG = "sovit-eval"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is evaluated, on what, and how."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or bucket address that sovit-train printed."""
    shards: tyro.conf.Positional[str]
    """Folder or bucket of shards, as sovit-shards writes them."""
    weights: Literal["auto", "ema", "raw", "both"] = "auto"
    """auto takes the moving average where the checkpoint has one, both the raw weights
    beside it."""
    real_labels: str = ""
    """ImageNet-ReaL's real.json, if SHARDS is ImageNet's validation set."""
    also: tuple[str, ...] = ()
    """Further shard sets, NAME=SHARDS, such as v2=shards/imagenet_v2."""
    report: str = ""
    """Folder for tables and pictures by class and of the worst images, those of further
    sets in folders by their names."""
    batch_size: int = 256
    decoder: Literal["auto", "dali", "torch"] = "auto"
    num_decode_threads: int = max((os.cpu_count() or 2) // 2, 1)
    code: str = ""
    """Recipe file that registers the checkpoint's model, where that is your own and the
    run is none that you trained here; it is run."""
    device: Wanted = "auto"
    json: str = ""
    """File that the result is also written to."""
    robustness: Flat = field(default_factory=Robustness)

    def check(self) -> None:
        """Raise ValueError for invalid options, before the work begins."""
        check_file(self.json, option="json")
        check_folder(self.report, option="report")
        self.robustness.check()


def evaluate_checkpoint(options: Options) -> dict[str, Any]:
    """Evaluate a checkpoint on a shard set, and on further ones.

    Returns:
        loss, top1 and top5 (percent), num_images, and num_bad, the images that can't
        be decoded; balanced_top1, the mean of the classes' recalls; with ReaL labels
        real_top1 and num_real, the images that have some.
        Where they are asked for: the same of the raw weights under `raw`, and of
        further sets by their names under `also`; `corruptions` and `perturbations`,
        see `pipelines.robustness.measure`.

    Raises ValueError where the checkpoint or the shards can't be used.
    """
    options.check()
    also = named_addresses(options.also, option="--also")
    load_model_code(options.checkpoint, given=options.code)
    with opened(options.checkpoint) as folder:
        models, manifest = _models(folder, options=options)
    # What can't be used is said before the work begins.
    classes = manifest.classes
    own = held_out(
        read_shard_set(options.shards),
        classes=classes,
        real_labels=options.real_labels,
    )
    others = [
        held_out(read_shard_set(address), classes=classes, name=name)
        for name, address in also.items()
    ]
    device = find_device(options.device)
    for model in models.values():
        model.to(device).to(memory_format=torch.channels_last)
    run = _evaluated(manifest.run, options=options)
    result: dict[str, Any] = {}
    for one in (own, *others):
        outcome = _measured(models, one, run=run, device=device)
        if one is own:
            result |= _values(outcome)
        else:
            result.setdefault("also", {})[one.name] = _values(outcome)
        if options.report:
            _write_report(outcome, one, options=options)
    if options.robustness.is_wanted:
        first = next(iter(models.values()))
        result |= _robustness(
            first,
            own,
            run=run,
            device=device,
            options=options.robustness,
            clean_error=100 - result["top1"],
        )
    return result


def _models(
    folder: Path, *, options: Options
) -> tuple[Mapping[str, nn.Module], Manifest]:
    """Load the requested weights, the main ones first."""
    if options.weights in ("auto", "both"):
        wanted = "both" if options.weights == "both" else "average"
        return load_models(folder, weights=wanted)
    model, manifest = load_model(folder, ema=options.weights == "ema")
    return {options.weights: model}, manifest


def _evaluated(run: Run, *, options: Options) -> Run:
    run = here(
        run, batch_size=options.batch_size, num_threads=options.num_decode_threads
    )
    data = dataclasses.replace(run.data, decoder=options.decoder)
    return dataclasses.replace(run, data=data)


def _measured(
    models: Mapping[str, nn.Module], one: HeldOut, *, run: Run, device: torch.device
) -> EvaluationResult:
    """Evaluate on the clean images; log those that can't be decoded."""
    bad: list[BadImage] = []
    try:
        return measure_set(models, one, run=run, device=device, on_bad=bad.extend)
    finally:
        for image in bad:
            shard = one.shards.groups.path_of(image.row_id)
            logger.warning("%s of %s left out: %s", image.key, shard, image.reason)


def _values(outcome: EvaluationResult) -> dict[str, Any]:
    first, *others = outcome.scores.items()
    return first[1].values() | {name: score.values() for name, score in others}


def _write_report(outcome: EvaluationResult, one: HeldOut, *, options: Options) -> None:
    found = named(outcome, shards=one.shards).report
    assert found is not None
    checkpoint, shards = (
        PurePosixPath(without_credentials(address)).name
        for address in (options.checkpoint, one.shards.address)
    )
    title = f"{checkpoint}, {one.name or shards}"
    write_report(found, Path(options.report, one.name), title=title)


def _robustness(
    model: nn.Module,
    own: HeldOut,
    *,
    run: Run,
    device: torch.device,
    options: Robustness,
    clean_error: float,
) -> dict[str, Any]:
    shards = own.shards
    subject = Subject(
        model=narrowed(model, own.columns),
        run=run,
        device=device,
        num_classes=len(own.classes),
        num_images=shards.groups.total_rows,
        open_batches=lambda run: opened_here(shards, run=run, device=device),
    )
    return measure(subject, options=options, clean_error=clean_error)


def _lines(result: Mapping[str, Any]) -> list[str]:
    """Format the result as lines of text, further sets and weights by name."""
    lines = [
        f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  "
        f"mean of classes {result['balanced_top1']:.2f} %  "
        f"loss {result['loss']:.4f}  {result['num_images']:,.0f} images counted, "
        f"{result['num_bad']:,.0f} left out"
    ]
    if "real_top1" in result:
        lines.append(
            f"ReaL top-1 {result['real_top1']:.2f} % of {result['num_real']:,} images"
        )
    if "raw" in result:
        lines += [f"raw weights: {line}" for line in _lines(result["raw"])]
    for name, values in result.get("also", {}).items():
        lines += [f"{name}: {line}" for line in _lines(values)]
    return lines


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    result = evaluate_checkpoint(options)
    print("\n".join(_lines(result)))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    if options.robustness.is_wanted:
        print(report.table(result))
    if options.report:
        print(f"report   {options.report}")
    if options.robustness.plot:
        path = Path(options.robustness.plot)
        report.draw(result, path=path)
        print(f"picture  {path}")


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


if __name__ == "__main__":
    main()
