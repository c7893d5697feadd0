"""A head is trained on tokens as the whole model would be, and on nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sovit
from pipelines.config import Data, Model, Optim, Run, Scale
from pipelines.errors import NonFiniteLossError
from pipelines.storage.path import StoragePath
from pipelines.training.model import build_model
from tests.small_runs import SO_VIT
from tests.token_sets import NUM_CLASSES, write_token_set
from tuning.heads.backbone import feature_shape
from tuning.heads.feature_set import TokenReader, TokenSet
from tuning.heads.train import build_head, train_head

CPU = torch.device("cpu")
RUN = Run(
    recipe="small",
    model=SO_VIT,
    data=Data(train="t", val="v", batch_size=16),
    optim=Optim(lr=5e-3, num_epochs=9, warmup_epochs=5, mixup=0.2),
    scale=Scale(amp="off"),
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenSet, TokenSet]:
    folder = tmp_path_factory.mktemp("tokens")
    train = write_token_set(folder / "train")
    return train, write_token_set(folder / "val", num_rows=61, seed=1)


def trained(
    run: Run, sets: tuple[TokenSet, TokenSet], **settings: Any
) -> list[dict[str, float]]:
    """Train a head; give what each epoch reported, but for the time it took."""
    logs: list[dict[str, float]] = []
    chosen: dict[str, Any] = {"num_epochs": 3, "seed": 0, "batch_size": 32, **settings}
    last = train_head(run, tokens=sets[0], val=sets[1], on_epoch=logs.append, **chosen)
    assert last == logs[-1]
    assert all(log.pop("head/images_per_s") > 0 for log in logs)
    return logs


def with_model(**changes: Any) -> Run:
    return dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, **changes))


@pytest.mark.parametrize(
    "method", ["svpn", "multi_head_svpn", "isqrt_cov", "gaussian", "avg"]
)
def test_it_learns_what_only_the_second_order_tells(
    sets: tuple[TokenSet, TokenSet], method: str
) -> None:
    """Tokens of all classes have the same mean: averaging them tells nothing."""
    shapes: dict[str, Any] = {"reduced_dim": 16, "num_heads": 1}
    if method in ("isqrt_cov", "gaussian"):
        shapes = {"reduced_dim": None}
    pooling = sovit.Pooling.named(method, **({} if method == "avg" else shapes))
    kwargs = {**SO_VIT.kwargs, "fusion": "visual"}
    logs = trained(with_model(pooling=pooling, kwargs=kwargs), sets)
    assert [log["epoch"] for log in logs] == [1, 2, 3]
    assert logs[-1]["head/train_loss"] < logs[0]["head/train_loss"]
    assert (logs[-1]["head/top1"] > 90) == (method != "avg")
    assert (logs[-1]["head/top1"] < 60) == (method == "avg")
    assert logs[-1]["head/top5"] == 100


def test_a_seed_gives_the_same_again_and_leaves_the_callers_numbers(
    sets: tuple[TokenSet, TokenSet],
) -> None:
    before = torch.get_rng_state()
    first, again, other = (trained(RUN, sets, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "model",
    [
        SO_VIT,
        Model(name="isqrt_resnet18_64", img_size=32),
        Model(name="resnet18", img_size=32),
        Model(name="test_vit", img_size=160),
        Model(
            name="swin_tiny_so",
            img_size=64,
            kwargs={"depths": (1, 1, 1, 1)},  # pyright: ignore[reportArgumentType]
        ),
    ],
    ids=lambda model: model.name,
)
def test_only_the_head_is_kept_and_it_answers_as_the_model_does(model: Model) -> None:
    """Tokens and maps, of ours and of timm's."""
    run = dataclasses.replace(RUN, model=model)
    torch.manual_seed(1)
    whole: Any = build_model(model, num_classes=NUM_CLASSES).eval()
    shape = feature_shape(whole, img_size=model.img_size)
    torch.manual_seed(1)
    head: Any = build_head(run, num_classes=NUM_CLASSES, shape=shape, device=CPU)
    with torch.no_grad():
        images = torch.randn(2, 3, model.img_size, model.img_size)
        tokens = whole.forward_features(images)
        assert tuple(tokens.shape[1:]) == shape
        assert torch.equal(head.forward_head(tokens), whole(images))
    params = dict(head.named_parameters())
    gone = {name for name, param in params.items() if param.is_meta}
    assert gone
    assert gone == {name for name, param in params.items() if not param.requires_grad}
    assert not {name for name in gone if name.startswith(("head.", "fc."))}
    assert any(name.startswith(("head.", "fc.")) for name in params)


def test_the_head_is_trained_as_the_optimiser_would(
    sets: tuple[TokenSet, TokenSet],
) -> None:
    """One plain step of gradient descent on all rows, written out."""
    run = with_model(pooling=sovit.Pooling(type="avg"))
    optim = dataclasses.replace(
        run.optim, optimizer="sgd", momentum=0.0, weight_decay=0.0, label_smoothing=0.0
    )
    run = dataclasses.replace(run, optim=optim)
    logs = trained(run, sets, num_epochs=1, batch_size=1000, lr=0.1, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        head: Any = build_head(
            run, num_classes=NUM_CLASSES, shape=sets[0].shape, device=CPU
        )
    batches = (next(TokenReader(one).epoch(0, batch_size=999)) for one in sets)
    losses = []
    for tokens, labels in batches:
        loss = torch.nn.functional.cross_entropy(
            head.forward_head(tokens.float()), labels
        )
        losses.append(loss.item())
        for param in head.head.parameters():
            (gradient,) = torch.autograd.grad(loss, param, retain_graph=True)
            param.data -= 0.1 * gradient
    assert [logs[0]["head/train_loss"], logs[0]["head/loss"]] == pytest.approx(losses)


def all_batches(
    reader: TokenReader, *, epoch: int, **settings: Any
) -> tuple[list[int], Tensor, Tensor]:
    parts = list(reader.epoch(epoch, batch_size=32, **settings))
    tokens, labels = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return [len(part) for part, _ in parts], tokens, labels


def test_a_set_that_is_not_held_gives_the_same_batches(tmp_path: Path) -> None:
    """Every image once an epoch, with its own label, in the epoch's view."""
    tokens = write_token_set(
        tmp_path / "set", num_rows=401, num_views=2, num_parts=4, numbered=True
    )
    # 100 rows a unit.
    bounds = {"unit_mb": 100 * 320 / 2**20}
    held = TokenReader(tokens, **bounds)
    streamed = TokenReader(tokens, max_held_mb=0, **bounds)
    orders = []
    for epoch in range(3):
        sizes, values, labels = all_batches(held, epoch=epoch, seed=1)
        same = all_batches(streamed, epoch=epoch, seed=1)
        assert sizes == same[0]
        assert torch.equal(values, same[1])
        assert torch.equal(labels, same[2])
        numbers = values.flatten(1)[:, 0].float() - epoch % 2 / 2
        assert sorted(numbers.tolist()) == list(range(401))
        assert torch.equal(labels, numbers.long() % NUM_CLASSES)
        orders.append(numbers.tolist())
    assert orders[0] != orders[2]
    in_order = all_batches(streamed, epoch=0, shuffle=False)[1]
    assert in_order.flatten(1)[:, 0].tolist() == list(range(401))


def test_what_does_not_fit_is_refused(
    tmp_path: Path, sets: tuple[TokenSet, TokenSet]
) -> None:
    with pytest.raises(ValueError, match=r"expected tokens of \(5, 16\), .*\(5, 32\)"):
        trained(with_model(kwargs={"depth": 1, "embed_dim": 16, "num_heads": 2}), sets)
    with pytest.raises(ValueError, match=r"expected tokens of \(10, 32\)"):
        trained(with_model(img_size=48), sets)
    with pytest.raises(ValueError, match="num_epochs"):
        trained(RUN, sets, num_epochs=0)
    other = dataclasses.replace(sets[1], classes=("a", "b", "d"))
    with pytest.raises(ValueError, match="the same classes"):
        trained(RUN, (sets[0], other))
    huge = write_token_set(tmp_path / "huge", value=np.nan)
    with pytest.raises(NonFiniteLossError, match="training loss of nan in epoch 1"):
        trained(RUN, (huge, huge))


def test_a_set_is_whole_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    tokens = write_token_set(folder)
    assert TokenSet.open(str(folder)) == tokens
    assert tokens.place == StoragePath(str(folder))
    file = min(folder.glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{file.name}: expected a whole file"):
        all_batches(TokenReader(tokens), epoch=0)
    (folder / "tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="write it again"):
        TokenSet.open(str(folder))
    (folder / "tokens.json").unlink()
    with pytest.raises(ValueError, match="expected a finished token set"):
        TokenSet.open(str(folder))
