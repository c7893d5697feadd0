"""Compare heads on a frozen backbone: `sovit-probe BACKBONE TRAIN VAL`.

    sovit-probe runs/demo/epoch_0008
    sovit-probe vit_small_patch14_dinov2.lvd142m shards/train shards/val \
      --weights pretrained

The backbone's tokens of all images are computed once. Then a linear probe, the nearest
neighbours and second-order heads take seconds each, and the best head becomes a
checkpoint with its backbone, for sovit-eval, sovit-predict and sovit-export.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import timm
import torch
import tyro
from torch import Tensor, nn

from pipelines.checkpoints.manifest import find_manifest
from pipelines.checkpoints.snapshot import MANIFEST, save_checkpoint
from pipelines.cli.command import parse, run_command
from pipelines.config import Data, Model, Optim, Run, Scale
from pipelines.data.loader import Position
from pipelines.driver.cluster import ray_session
from pipelines.storage.path import StoragePath
from pipelines.training.model import build_model, takes_pooling, without_weights
from sovit import Pooling
from tuning.heads.backbone import Backbone, load_backbone
from tuning.heads.extract import write_tokens
from tuning.heads.feature_set import TokenSet
from tuning.heads.side_by_side import (
    HEADS,
    KNN,
    Result,
    changed,
    has_class_token,
    nearest,
    train_best,
    with_head,
)

logger = logging.getLogger(__name__)
_PROG = "sovit-probe"
_DEFAULT = (KNN, "class", "mean", "isqrt_cov", "svpn", "multi_head_svpn", "moment")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Backbone, images and heads of a comparison."""

    backbone: tyro.conf.Positional[str]
    """A checkpoint of ours, or the name of a model that timm knows, with --weights."""
    train: tyro.conf.Positional[str] = ""
    """Shards that heads are trained on; by default a checkpoint's own."""
    val: tyro.conf.Positional[str] = ""
    """Shards that they are measured on; by default a checkpoint's own."""
    weights: str = ""
    """Of a model of timm: pretrained loads timm's, random leaves fresh ones, anything
    else is a file or a checkpoint to start from."""
    heads: tuple[str, ...] = _DEFAULT
    """knn, class and mean (linear probes), class+mean, cov, isqrt_cov, drop_cov, svpn,
    multi_head_svpn, moment; those of a class token are left out where there is none."""
    num_epochs: int = 10
    """Epochs of each head."""
    lr: tuple[float, ...] = (1e-3,)
    """Peak learning rates, of which each head gets the best by --val."""
    num_views: int = 1
    """Views of each training image: evaluation's, and further ones changed as training
    changes them. Published heads see new ones in every epoch."""
    num_neighbors: int = 20
    img_size: int = 0
    """Side of the images in pixels; 0 is the backbone's own."""
    use_gpu: bool = False
    seed: int = 42
    name: str = "probe"
    storage: str = "runs"
    """Folder: tokens, table and the best head's checkpoint lie below it, by --name."""

    def __post_init__(self) -> None:
        """Raise ValueError for invalid options, before the work begins."""
        known = (KNN, *HEADS)
        unknown = [name for name in self.heads if name not in known]
        if unknown or not self.heads:
            raise ValueError(
                f"--heads: expected some of {', '.join(known)}, got "
                f"{', '.join(unknown) or 'none'}; leave the option out for a choice"
            )
        for name in ("num_epochs", "num_views", "num_neighbors"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected at least 1, got "
                    f"{getattr(self, name)}"
                )
        if not self.lr or min(self.lr) <= 0:
            raise ValueError(f"--lr: expected numbers above 0, got {self.lr}")
        if "://" in self.storage:
            raise ValueError(
                f"--storage: expected a folder of this machine, got {self.storage}"
            )


def probe(options: Options) -> list[Result]:
    """Compare heads on one backbone's tokens; best first.

    Raises ValueError where backbone, weights or shards can't be used.
    """
    folder = Path(options.storage) / options.name
    run = _run(options)
    if options.weights == "random":
        run = _drawn(run, folder=folder / "random")
    backbone = load_backbone(run, checkpoint="", num_classes=1)
    with ray_session(run.scale):
        tokens = write_tokens(
            run,
            checkpoint="",
            out=str(folder / "tokens"),
            num_views=options.num_views,
        )
    has_class = has_class_token(run)
    found: list[Result] = []
    best: tuple[float, Run, Mapping[str, Tensor]] | None = None
    for head in options.heads:
        if head == KNN:
            own = with_head(run, "class" if has_class else "mean", has_class=has_class)
            assert own is not None
            found.append(
                nearest(own, tokens=tokens, num_neighbors=options.num_neighbors)
            )
            continue
        own = with_head(run, head, has_class=has_class)
        if own is None:
            logger.info("%s: left out, the backbone has no class token", head)
            continue
        result, state = train_best(
            own,
            head=head,
            tokens=tokens,
            num_epochs=options.num_epochs,
            rates=options.lr,
        )
        found.append(result)
        logger.info("%s: %.2f %% in %.0f s", head, result.top1, result.seconds)
        if state and (best is None or result.top1 > best[0]):
            best = result.top1, own, state
    found.sort(key=lambda result: (bool(result.failure), -result.top1))
    _write_table(found, folder=folder)
    if best is not None:
        top1, own, state = best
        _save(
            folder / "best",
            run=own,
            backbone=backbone,
            state=state,
            tokens=tokens.train,
            options=options,
            metrics={"val/top1": top1},
        )
    return found


def _run(options: Options) -> Run:
    """Build the run whose model is the backbone, with an average pooling."""
    manifest = find_manifest(StoragePath(options.backbone))
    if manifest is not None:
        trained = manifest.run
        if options.weights:
            raise ValueError(
                f"--weights: expected none with a checkpoint, got {options.weights}; "
                "leave the option out"
            )
        model = dataclasses.replace(trained.model, init_from=options.backbone)
        run = dataclasses.replace(trained, recipe=options.name, model=model)
    else:
        run = _of_timm(options)
    size = options.img_size or run.model.img_size
    train, val = options.train or run.data.train, options.val or run.data.val
    if not train or not val:
        raise ValueError(
            f"expected shards to train on and to measure on, got {train!r} and {val!r};"
            f" write {_PROG} BACKBONE TRAIN VAL"
        )
    return dataclasses.replace(
        run,
        storage=options.storage,
        seed=options.seed,
        model=dataclasses.replace(run.model, img_size=size),
        data=dataclasses.replace(run.data, train=train, val=val),
        scale=dataclasses.replace(
            run.scale, num_workers=1, min_workers=0, use_gpu=options.use_gpu
        ),
    )


def _of_timm(options: Options) -> Run:
    name, weights = options.backbone, options.weights
    if not timm.is_model(name):
        raise ValueError(
            f"expected a checkpoint or a model that timm knows, got {name!r}; see "
            "timm.list_models()"
        )
    if not weights:
        raise ValueError(
            f"expected --weights with {name}: pretrained, random, or a file"
        )
    config = timm.get_pretrained_cfg(name)
    known = {} if config is None else config.to_dict()
    size = known.get("input_size", (3, 224, 224))[1]
    kwargs: dict[str, Any] = {}
    if not takes_pooling(name):
        kwargs["drop_last_stride"] = False  # the weights are not of such a network
        if known.get("fixed_input_size") and options.img_size:
            kwargs["img_size"] = options.img_size
    kwargs |= {"pretrained": True} if weights == "pretrained" else {}
    is_file = weights not in ("pretrained", "random")
    data = {key: known[key] for key in ("mean", "std", "crop_pct") if key in known}
    return Run(
        recipe=options.name,
        model=Model(
            name=name,
            img_size=size,
            pooling=Pooling.named("avg"),
            init_from=weights if is_file else "",
            kwargs=kwargs,
        ),
        data=Data(train=options.train, val=options.val, batch_size=256, **data),
        optim=Optim(lr=options.lr[0], num_epochs=options.num_epochs, warmup_epochs=0),
        scale=Scale(num_workers=1),
    )


def _drawn(run: Run, *, folder: Path) -> Run:
    """Keep fresh weights of a seed as a checkpoint, and start from it."""
    if not (folder / MANIFEST).exists():
        torch.manual_seed(run.seed)
        model = build_model(run.model, num_classes=1)
        _keep(model, folder=folder, run=run, classes=("none",), num_epochs=0)
    return changed(run, init_from=str(folder))


def _keep(
    model: nn.Module,
    *,
    folder: Path,
    run: Run,
    classes: tuple[str, ...],
    num_epochs: int,
    metrics: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Write a model as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        folder,
        run=run,
        position=Position(epoch=num_epochs),
        classes=classes,
        metrics=metrics,
        model=model,
        ema=None,
        optimizer=None,
    )


def _save(
    folder: Path,
    *,
    run: Run,
    backbone: Backbone,
    state: Mapping[str, Tensor],
    tokens: TokenSet,
    options: Options,
    metrics: Mapping[str, float],
) -> None:
    """Write the backbone with a head as a checkpoint."""
    run = dataclasses.replace(run, model=without_weights(run.model))
    model = build_model(run.model, num_classes=len(tokens.classes))
    # A model of timm's own has its weights under its own names.
    weights = {f"backbone.{name}": part for name, part in backbone.weights.items()}
    weights |= {**backbone.weights, **state}
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    _keep(
        model,
        folder=folder,
        run=run,
        classes=tokens.classes,
        num_epochs=options.num_epochs,
        metrics=metrics,
    )


def _write_table(found: Sequence[Result], *, folder: Path) -> None:
    """Print the table, and keep it as heads.csv."""
    table = pd.DataFrame([dataclasses.asdict(result) for result in found])
    table.to_csv(folder / "heads.csv", index=False)
    shown = table.round({"top1": 2, "top5": 2, "seconds": 0})
    print(shown.rename(columns={"num_params": "parameters"}).to_string(index=False))


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    probe(options)
    best = Path(options.storage) / options.name / "best"
    if best.is_dir():
        print(f"best        {best}")
        print(f"predict     sovit-predict {best} photo.jpg")
