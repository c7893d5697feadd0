"""sovit-probe: heads on one backbone's tokens, and the best one as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from pipelines.config import Data, Optim, Run, Scale
from pipelines.evaluate import Options as Evaluated
from pipelines.evaluate import evaluate_checkpoint
from tests.small_runs import SO_VIT
from tests.small_sets import write_set
from tests.token_sets import write_token_set
from tuning.heads.extract import TokenReader, TokenSets
from tuning.heads.side_by_side import HEADS, nearest, train_best, with_head
from tuning.probe import Options, _main, probe

RUN = Run(
    recipe="small",
    model=SO_VIT,
    data=Data(train="t", val="v", batch_size=16),
    optim=Optim(lr=5e-3, num_epochs=2, warmup_epochs=0),
    scale=Scale(amp="off"),
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSets:
    folder = tmp_path_factory.mktemp("tokens")
    train = write_token_set(folder / "train")
    return TokenSets(train, write_token_set(folder / "val", num_rows=61, seed=1))


def test_neighbours_are_counted_as_by_hand(tokens: TokenSets) -> None:
    run = with_head(RUN, "class", has_class=True)
    assert run is not None
    found = nearest(run, tokens=tokens, num_neighbors=7)
    vectors = []
    for split in tokens:
        ((batch, labels),) = TokenReader(split).epoch(0, batch_size=1024, shuffle=False)
        vectors.append((normalize(batch[:, 0].float()), labels))
    (keys, labels), (queries, wanted) = vectors
    hits = 0
    for query, label in zip(queries, wanted.tolist(), strict=True):
        likeness = keys @ query
        votes = torch.zeros(3)
        for at in likeness.argsort(descending=True)[:7]:
            votes[labels[at]] += (likeness[at] / 0.07).exp()
        hits += int(votes.argmax()) == label
    assert found.top1 == pytest.approx(100 * hits / len(wanted))
    assert found.top5 == 100
    assert found.num_params == 0


def test_each_head_gets_the_best_of_the_rates(tokens: TokenSets) -> None:
    run = with_head(RUN, "isqrt_cov", has_class=True)
    assert run is not None
    chosen: dict[str, Any] = {"head": "isqrt_cov", "tokens": tokens, "num_epochs": 2}
    alone = {lr: train_best(run, rates=(lr,), **chosen)[0].top1 for lr in (1e-7, 1e-2)}
    assert alone[1e-7] < alone[1e-2]
    best, state = train_best(run, rates=(1e-7, 1e-2, 1e30), **chosen)
    assert (best.lr, best.top1) == (1e-2, alone[1e-2])
    assert all(name.startswith("head.") for name in state)
    counted = sum(state[name].numel() for name in state if "running" not in name)
    assert best.num_params == counted - 1  # BatchNorm counts its batches

    failed, nothing = train_best(run, rates=(1e30,), **chosen)
    assert failed.failure
    assert not nothing


def test_a_head_of_a_class_token_needs_one() -> None:
    assert with_head(RUN, "class", has_class=False) is None
    without = with_head(RUN, "svpn", has_class=False)
    assert without is not None
    assert without.model.kwargs["fusion"] == "visual"


@pytest.mark.ray
def test_a_backbone_of_timm_from_shards_to_an_evaluated_head(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_set(tmp_path / "train", groups=[[48]], size=(40, 40))
    val = write_set(tmp_path / "val", groups=[[24]], size=(40, 40))
    storage = str(tmp_path / "runs")
    heads = ["knn", "class", "mean", "svpn"]
    command = ["test_vit", train, val, "--weights", "random", "--storage", storage]
    command += ["--img-size", "32", "--num-epochs", "2", "--heads", *heads]
    _main(command)
    said = capsys.readouterr().out
    folder = tmp_path / "runs" / "probe"
    table = pd.read_csv(folder / "heads.csv").set_index("head")
    assert set(table.index) == set(heads)
    trained = table.drop(index="knn")
    assert min(trained["num_params"]) > 0
    assert f"sovit-predict {folder / 'best'}" in said
    got = evaluate_checkpoint(Evaluated(checkpoint=str(folder / "best"), shards=val))
    # The tokens of the table are float16.
    assert got["top1"] == pytest.approx(trained["top1"].max(), abs=100 / 24)
    again = probe(
        Options(
            backbone=str(folder / "best"),
            train=train,
            val=val,
            storage=storage,
            name="again",
            heads=("mean",),
            num_epochs=2,
        )
    )
    assert again[0].top1 == pytest.approx(table.loc["mean", "top1"], abs=100 / 24)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"heads": ("knn", "gap")}, "--heads: expected .* got gap"),
        ({"heads": ()}, "--heads: expected .* got none"),
        ({"num_epochs": 0}, "--num-epochs"),
        ({"lr": (0.0,)}, "--lr"),
        ({"storage": "s3://bucket/runs"}, "--storage"),
    ],
)
def test_bad_options_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Options(backbone="test_vit", **changes)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no_such_model", "t", "v"], "a checkpoint or a model that timm knows"),
        (["test_vit", "t", "v"], "expected --weights with test_vit"),
        (["test_vit", "--weights", "random"], "expected shards to train on"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        _main([*arguments, "--storage", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_on_a_backbone_with_a_class_token(
    head: str, tokens: TokenSets
) -> None:
    run = with_head(RUN, head, has_class=True)
    assert run is not None
    found, state = train_best(
        run, head=head, tokens=tokens, num_epochs=1, rates=(1e-3,)
    )
    assert found.failure == ""
    assert found.num_params > 0
    assert state
