"""What is frozen stays as it was, statistics included, until its epoch comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from pipelines.config import Model, Optim
from pipelines.config.overrides import change_fields
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.driver.preflight import check_run
from pipelines.dry_run.command import show_dry_run
from pipelines.training.optimizer import freeze
from tests.fault_runs import brief_run
from tests.small_runs import plain, small_run, state_of, train_run
from tests.small_sets import write_set

RESNET = Model(name="test_resnet", img_size=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("freezing") / "set"
    return read_shard_set(write_set(folder, groups=[[12, 12]]))


def frozen_of(name: str, **optim: Any) -> set[str]:
    kwargs: dict[str, Any] = {"depth": 3, "img_size": 32} if "so_vit" in name else {}
    model = timm.create_model(name, num_classes=5, **kwargs)
    found = freeze(model, optim=Optim(lr=1.0, num_epochs=9, **optim)).names
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == (set() if "unfreeze_epoch" in optim else found)
    return set(found)


def test_layers_are_counted_from_the_input_on() -> None:
    three = frozen_of("so_vit_7", freeze_layers=3)
    firsts = {name.split(".")[0] for name in three}
    assert {name.split(".")[1] for name in three if "blocks" in name} == {"0", "1"}
    assert firsts == {"cls_token", "patch_embed", "blocks"}
    assert frozen_of("so_vit_7", freeze_layers=3, unfreeze_epoch=1) == three
    head = frozen_of("so_vit_7", freeze=r"^(?!head\.)")
    assert {name for name in three if name.startswith("head.")} == set()
    assert head > three
    probe = frozen_of("so_vit_7", freeze_layers=-1)
    assert {name for name in probe - head if "head.fc_" in name} == set()
    assert frozen_of("test_resnet", freeze_layers=1) == {
        f"{name}.{part}"
        for name in ("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")
        for part in (("weight", "bias") if name in BATCHNORMS else ("weight",))
    }


BATCHNORMS = ("conv1.1", "conv1.4", "bn1")


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("num_accumulation", [1, 2])
def test_a_linear_probe_trains_the_classifier_alone(
    shards: ShardSet, num_accumulation: int
) -> None:
    run = small_run(
        shards.address,
        model=RESNET,
        freeze_layers=-1,
        ema_decay=0.9,
        clip_grad_norm=1.0,
        num_accumulation=num_accumulation,
    )
    state = state_of(run)
    before = plain(state.model)
    train_run(run, shards=shards, state=state)
    # No statistic of BatchNorm, nor its number of batches.
    assert moved(before, plain(state.model)) == {"fc.weight", "fc.bias"}
    assert state.ema is not None
    assert moved(before, plain(state.ema.module)) == {"fc.weight", "fc.bias"}


def test_what_is_unfrozen_is_trained_from_its_epoch_on(shards: ShardSet) -> None:
    run = small_run(shards.address, model=RESNET, freeze_layers=1, unfreeze_epoch=2)
    state = state_of(run)
    before = plain(state.model)
    frozen = {name for name in before if name.startswith(("conv1.", "bn1."))}
    two = change_fields(run, {"optim.num_epochs": 2, "optim.unfreeze_epoch": 0})
    train_run(two, shards=shards, state=state)
    assert state.position.epoch == 2
    assert moved(before, plain(state.model)).isdisjoint(frozen)
    held = state.optimizer.state
    params = dict(state.model.named_parameters())
    assert all((params[name] in held) == (name not in frozen) for name in params)
    train_run(run, shards=shards, state=state)
    assert moved(before, plain(state.model)) >= frozen


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"freeze": "("}, r"optim\.freeze: expected a regular expression"),
        ({"freeze": "blokcs"}, r"names such as cls_token and .*, which matches none"),
        ({"freeze": "."}, "expected a parameter to train, .* freeze all"),
        ({"freeze_layers": 99}, "expected a parameter to train"),
        ({"freeze_layers": -2}, r"optim\.freeze_layers: expected at least -1"),
        ({"unfreeze_epoch": 1}, r"optim\.unfreeze_epoch: expected .* with freeze"),
        ({"freeze": "a", "unfreeze_epoch": 5}, r"an epoch before the last one"),
    ],
)
def test_what_freezes_nothing_or_all_is_refused(
    tmp_path: Path, optim: dict[str, Any], message: str
) -> None:
    run = brief_run(tmp_path, num_epochs=5)
    changes = {f"optim.{name}": value for name, value in optim.items()}
    with pytest.raises(ValueError, match=message):
        check_run(change_fields(run, changes))


def test_a_dry_run_counts_what_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = brief_run(tmp_path, num_epochs=1)
    show_dry_run(change_fields(run, {"optim.freeze_layers": -1}), name="none")
    model = state_of(run, num_classes=10).model
    head = sum(p.numel() for n, p in model.named_parameters() if "head.fc_" in n)
    assert f" parameters, {head:,} trained" in capsys.readouterr().out
