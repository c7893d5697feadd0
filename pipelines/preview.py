"""Show the images that training sees: `python -m pipelines.preview RECIPE`.

    python -m pipelines.preview demo
    python -m pipelines.preview finetune.folder --data.train ~/photos
    python -m pipelines.preview imagenet.so_vit_14 --data.train /shards/train

A row an image, first as evaluation sees it, then as training does in the first epochs,
by the very code and numbers of a training. Written as a PNG and kept in MLflow.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines import tracking
from pipelines.cli.command import parse, run_command
from pipelines.cli.outputs import check_plot
from pipelines.config import Run
from pipelines.config.recipes import load_recipe
from pipelines.data.loader import LocalOpener, Plans, reading_of
from pipelines.data.shard_set import read_shard_set
from pipelines.driver.preflight import with_absolute_paths, with_shards
from pipelines.evaluation.held_out import with_labels
from pipelines.hardware.device import find_device
from pipelines.transforms.decoder import BatchDecoder
from pipelines.transforms.rows import Rows, rows_of

_PROG = "pipelines.preview"
_INCHES_PER_IMAGE = 2.0


def preview(run: Run, *, num_images: int, num_epochs: int, path: Path) -> None:
    """Write a picture grid of a run's first images as a PNG.

    Raises ValueError where the shards can't be used, or where fewer images than wanted
    are whole.
    """
    # Here, since pixels that readers made would be of one epoch.
    data = dataclasses.replace(run.data, decode_on="workers")
    run = dataclasses.replace(run, data=data)
    shards = read_shard_set(run.data.train)
    if run.data.balance:
        shards = with_labels(shards)
    plan = Plans(shards=shards, run=run, train=True).plan(0)
    opener = LocalOpener(reading_of(shards, run=run))
    opener.prepare(lambda: [plan.unit(0)])
    rows = rows_of(next(opener.open())).cut(0, num_images)
    if len(rows) < num_images:
        raise ValueError(
            f"expected {num_images} images, got {len(rows)} in the first share; lower "
            "--num-images"
        )
    see_fixed, see_drawn = (_Viewer(run, rows, train=train) for train in (False, True))
    columns = [("evaluation", *see_fixed(0))]
    columns += [(f"epoch {epoch}", *see_drawn(epoch)) for epoch in range(num_epochs)]
    names = [shards.classes[label] for label in rows.labels]
    _draw(columns, names=names, path=path)


class _Viewer:
    """Decoder of some rows as training or evaluation sees them, epoch by epoch."""

    def __init__(self, run: Run, rows: Rows, *, train: bool) -> None:
        self._run, self._rows = run, rows
        self._decode = BatchDecoder(
            run.pixels(train=train), num_rows=len(rows), device=find_device("auto")
        )

    def __call__(self, epoch: int) -> tuple[np.ndarray, list[str]]:
        """Return float images (n, H, W, 3) from 0 to 1, and the operations on each."""
        found = self._decode(self._rows, epoch)
        if found.bad:
            raise ValueError(
                f"expected images that decode, got {found.bad[0].key}: "
                f"{found.bad[0].reason}; set another --seed"
            )
        images = _denormalized(found.images, run=self._run)
        return images, self._decode.describe(self._rows, epoch)


def _denormalized(images: Tensor, *, run: Run) -> np.ndarray:
    mean, std = (torch.tensor(value) for value in (run.data.mean, run.data.std))
    pixels = images.cpu().permute(0, 2, 3, 1) * std + mean
    return pixels.clamp(0, 1).numpy()


def _draw(
    columns: Sequence[tuple[str, np.ndarray, list[str]]],
    *,
    names: Sequence[str],
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    size = (_INCHES_PER_IMAGE * len(columns), 1.25 * _INCHES_PER_IMAGE * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for at, (title, images, texts) in enumerate(columns):
        for row, name in enumerate(names):
            place = axes[row, at]
            place.imshow(images[row])
            place.set_xticks([])
            place.set_yticks([])
            place.set_xlabel(texts[row], fontsize=7)
            if at == 0:
                place.set_ylabel(name[:24], fontsize=8)
            if row == 0:
                place.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)


def _keep(run: Run, *, path: Path) -> None:
    """Log the picture to MLflow, as a run of its own."""
    uri = tracking.default_uri(run.storage)
    run_id = tracking.open_run(
        uri,
        experiment=run.experiment,
        name=f"preview-{run.recipe}",
        params={"recipe": run.recipe},
        tags={"kind": "preview"},
    )
    tracking.log_file(uri, run_id, file=path)
    tracking.end_run(uri, run_id, status="FINISHED")


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


def _main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            f"expected a recipe first, such as demo, got none; try python -m {_PROG} "
            "demo"
        )
    recipe, *rest = arguments
    parser = argparse.ArgumentParser(_PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--num-images", type=int, default=6)
    parser.add_argument("--num-epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("preview.png"))
    chosen, rest = parser.parse_known_args(rest)
    if chosen.num_images < 1 or chosen.num_epochs < 1:
        raise ValueError(
            f"expected at least 1 image and 1 epoch, got {chosen.num_images} and "
            f"{chosen.num_epochs}; set --num-images and --num-epochs"
        )
    check_plot(chosen.out, option="out")

    def parse_on(default: Run) -> Run:
        return parse(Run, default=default, arguments=rest, prog=_PROG, text=__doc__)

    run = parse_on(load_recipe(recipe))
    run = with_shards(run, recipe=recipe, typed=rest, parse_on=parse_on) or run
    run = with_absolute_paths(run)
    preview(
        run,
        num_images=chosen.num_images,
        num_epochs=chosen.num_epochs,
        path=chosen.out,
    )
    _keep(run, path=chosen.out)
    print(f"picture  {chosen.out}")


if __name__ == "__main__":
    main()
