"""Tokens in a set are those that the model gives the images, each image once."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.config import Run, Scale
from pipelines.data.batch import Position
from pipelines.data.loader import opened_here, reading_of
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.storage.path import StoragePath
from pipelines.training.model import build_model
from sovit.weights.official import official_names
from tests.demo_runs import small_demo
from tuning.heads.backbone import Backbone, load_backbone
from tuning.heads.extract import write_tokens
from tuning.heads.feature_set import TokenSet
from tuning.heads.feature_writer import TokenWriter, make_job, part_plan
from tuning.heads.parts import Part, read_part
from tuning.heads.train import train_head

BAD_ROW = 7
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Hold a run whose model has weights: fresh ones, that a checkpoint keeps."""

    run: Run
    checkpoint: str
    model: Any


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("tokens")
    run = small_demo(folder, num_epochs=1, bad_rows=[BAD_ROW], token_embed="resnet")
    run = dataclasses.replace(
        run,
        scale=Scale(amp="off"),
        data=dataclasses.replace(run.data, max_bad_share=0.05),
    )
    torch.manual_seed(0)
    model, average = (build_model(run.model, num_classes=10).eval() for _ in range(2))
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    save_checkpoint(
        checkpoint,
        run=run,
        position=Position(),
        classes=read_shard_set(run.data.train).classes,
        metrics={},
        model=model,
        ema=average,
        optimizer=None,
    )
    return Trained(run=run, checkpoint=str(checkpoint), model=average)


@torch.no_grad()
def wanted_tokens(
    trained: Trained, *, shards: ShardSet, epoch: int | None = None
) -> dict[int, Tensor]:
    """Give every image's features by its row: evaluation's, or those of an epoch."""
    run = trained.run
    train = epoch is not None
    optim = dataclasses.replace(run.optim, num_epochs=1 + (epoch or 0))
    run = dataclasses.replace(run, optim=optim)
    found: dict[int, Tensor] = {}
    with opened_here(shards, run=run, device=CPU, train=train) as batches:
        for batch in batches:
            if train and batch.epoch != epoch:
                continue
            features = trained.model.forward_features(batch.images)
            for row, tokens in zip(batch.draw_ids, features, strict=True):
                if row >= 0:
                    found[int(row)] = tokens
            if not train and batch.ends_epoch:
                break
    return found


def rows_of_set(tokens: TokenSet, *, view: int = 0) -> Any:
    """Read all rows of a view as people would: with pyarrow alone."""
    paths = [
        Path(tokens.place.address, tokens.place.inner, n) for n in tokens.views[view]
    ]
    return pq.read_table(paths)


def check_view(tokens: TokenSet, *, view: int, wanted: dict[int, Tensor]) -> None:
    table = rows_of_set(tokens, view=view)
    ids = table["row_id"].to_pylist()
    assert ids == sorted(wanted)
    content = np.frombuffer(b"".join(table["tokens"].to_pylist()), np.float16)
    came = torch.from_numpy(content.reshape(-1, *tokens.shape).astype(np.float32))
    expected = torch.stack([wanted[row] for row in ids])
    assert torch.allclose(came, expected, rtol=2**-11, atol=1e-4)


def written(
    trained: Trained,
    out: StoragePath,
    *,
    split: str,
    backbone: Backbone,
    num_views: int = 1,
) -> None:
    """Write a split's files in this process, without Ray."""
    shards = read_shard_set(getattr(trained.run.data, split))
    job = make_job(
        trained.run, shards=shards, out=out, backbone=backbone, num_views=num_views
    )
    out.make_folder()
    write = TokenWriter({split: job}, backbone=backbone)
    plan = part_plan(shards, shape=job.shape)
    reading = reading_of(shards, run=job.run)
    for view in range(num_views):
        for index, unit in enumerate(plan.units()):
            part = Part(split=split, view=view, index=index, unit=unit)
            (table,) = read_part(part, reading=reading)
            counted = write(table)
            assert counted["num_images"].to_pylist() == [unit.num_rows]


@pytest.mark.ray
def test_the_job_writes_every_image_once_and_only_once(
    ray_local: None,
    trained: Trained,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, out = trained.run, str(tmp_path / "tokens")
    sets = write_tokens(run, checkpoint=trained.checkpoint, out=out)
    train_shards = read_shard_set(run.data.train)
    for tokens, shards in zip(
        sets, (train_shards, read_shard_set(run.data.val)), strict=True
    ):
        wanted = wanted_tokens(trained, shards=shards)
        assert set(wanted) == set(range(shards.groups.total_rows)) - {BAD_ROW}
        check_view(tokens, view=0, wanted=wanted)
        assert (tokens.num_images, tokens.num_bad) == (len(wanted), 1)
        assert tokens.shape == (5, 32)
    rows = rows_of_set(sets.train)
    paths = sorted(Path(run.data.train).glob("*.parquet"))
    shards = pq.read_table(paths, columns=["key", "label"])
    kept = [at for at in range(len(shards)) if at != BAD_ROW]
    assert rows.select(["key", "label"]).equals(shards.take(kept))
    assert f"{shards['key'][BAD_ROW].as_py()} of" in caplog.text
    metrics = train_head(run, tokens=sets.train, val=sets.val, num_epochs=2, seed=0)
    assert metrics["epoch"] == 2
    assert 0 < metrics["head/top1"] < metrics["head/top5"] <= 100


def test_what_is_there_is_used_again_and_nothing_else(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without Ray: files of a job that was stopped are enough to finish the set."""
    caplog.set_level(logging.INFO)
    run, out = trained.run, StoragePath(str(tmp_path / "tokens"))
    backbone = load_backbone(run, checkpoint=trained.checkpoint, num_classes=10)
    for split in ("train", "val"):
        written(trained, out.within(split), split=split, backbone=backbone)
    arguments: dict[str, Any] = {"checkpoint": trained.checkpoint, "out": out.address}
    first = write_tokens(run, **arguments)
    assert "using the tokens in" not in caplog.text
    # Pooling and head do not matter to tokens.
    model = dataclasses.replace(run.model, pooling=None, drop_path_rate=0.0)
    again = write_tokens(dataclasses.replace(run, model=model), **arguments)
    assert again == first
    assert f"using the tokens in {first.val.place}: 100 images" in caplog.text
    crop = dataclasses.replace(run.data, crop_pct=0.8)
    with pytest.raises(ValueError, match="another pixels; name another folder"):
        write_tokens(dataclasses.replace(run, data=crop), **arguments)
    for split in ("train", "val"):
        Path(out.address, split, "tokens.json").unlink()
    with pytest.raises(ValueError, match="another augment, num_views, seed;"):
        write_tokens(run, num_views=2, **arguments)
    strict = dataclasses.replace(run.data, max_bad_share=0.0)
    with pytest.raises(ValueError, match=r"at most 0.00% of 301"):
        write_tokens(dataclasses.replace(run, data=strict), **arguments)
    with pytest.raises(ValueError, match="expected a finished token set"):
        TokenSet.open(f"{out.address}/train")


def test_further_views_are_those_of_the_trainings_epochs(
    trained: Trained, tmp_path: Path
) -> None:
    out = StoragePath(str(tmp_path))
    backbone = load_backbone(trained.run, checkpoint=trained.checkpoint, num_classes=10)
    for split, num_views in (("train", 2), ("val", 1)):
        written(
            trained,
            out.within(split),
            split=split,
            backbone=backbone,
            num_views=num_views,
        )
    tokens, _ = write_tokens(
        trained.run, checkpoint=trained.checkpoint, out=out.address, num_views=2
    )
    shards = read_shard_set(trained.run.data.train)
    evaluated = wanted_tokens(trained, shards=shards)
    changed = wanted_tokens(trained, shards=shards, epoch=1)
    check_view(tokens, view=0, wanted=evaluated)
    check_view(tokens, view=1, wanted=changed)
    assert not torch.allclose(evaluated[0], changed[0], atol=1e-2)


def test_what_float16_cant_hold_is_refused_by_name(
    trained: Trained, tmp_path: Path
) -> None:
    backbone = load_backbone(trained.run, checkpoint=trained.checkpoint, num_classes=10)
    weights = {**backbone.weights, "norm.weight": backbone.weights["norm.weight"] * 1e6}
    backbone = dataclasses.replace(backbone, weights=weights)
    with pytest.raises(
        ValueError, match=r"^\S+: expected tokens up to 65,504, .* so_vit"
    ):
        written(trained, StoragePath(str(tmp_path)), split="val", backbone=backbone)


def test_a_backbone_is_found_or_refused(trained: Trained, tmp_path: Path) -> None:
    """Checkpoints of ours, what a run starts from, released files; no fresh weights."""
    run = trained.run
    ours = load_backbone(run, checkpoint=trained.checkpoint, num_classes=10)
    model = dataclasses.replace(run.model, init_from=trained.checkpoint)
    started = load_backbone(
        dataclasses.replace(run, model=model), checkpoint="", num_classes=10
    )
    assert started.made_of == ours.made_of
    released = {}
    for name, tensor in trained.model.state_dict().items():
        parts = official_names(name, model=trained.model)
        cut = tensor.ndim and len(parts) > 1
        tensors = tensor.split((48, 24)) if cut else [tensor] * len(parts)
        released |= dict(zip(parts, tensors, strict=True))
    torch.save(released, tmp_path / "released.pth")
    theirs = load_backbone(
        run, checkpoint=str(tmp_path / "released.pth"), num_classes=10
    )
    assert theirs.made_of == ours.made_of
    built: Any = theirs.build()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(
        built.forward_features(images), trained.model.forward_features(images)
    )
    with pytest.raises(ValueError, match="expected a trained backbone, got 'so_vit_7'"):
        load_backbone(run, checkpoint="", num_classes=10)
    with pytest.raises(ValueError, match="num_views"):
        write_tokens(run, checkpoint=trained.checkpoint, out="t", num_views=0)
