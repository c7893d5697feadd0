"""A step that is no number: it is told of in full, and never reaches the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import sovit
from pipelines.config import Model, Run
from pipelines.data.batch import Batch
from pipelines.errors import NonFiniteLossError, RewindError
from pipelines.training.nonfinite import group_of
from pipelines.training.state import TrainState, build_state
from tests.small_runs import CPU, SO_VIT, plain, small_run
from tests.test_loop import batch_of, looped, pictures, run_loop

BAD = 2
MPN_COV = Model(
    name="isqrt_mobilenetv2",
    img_size=32,
    pooling=sovit.Pooling.named("mpn_cov", reduced_dim=16),
    kwargs={"backbone": "test_resnet"},
)


def batches(*, size: int = 16, value: float = math.nan, num: int = 4) -> list[Batch]:
    """Make a few batches; one has an image with a pixel that is no number."""
    images, labels = pictures(4)
    images = torch.nn.functional.interpolate(images, size=(size, size))
    broken = images.clone()
    broken[1, 0, 0, 0] = value
    return [
        batch_of(broken if index == BAD else images, labels, index=index)
        for index in range(num)
    ]


def guarded(run: Run) -> TrainState:
    def keys_of(rows: Sequence[int]) -> dict[int, str]:
        return {row: f"cat/{row}.jpg" for row in rows}

    return build_state(run, num_classes=3, device=CPU, keys_of=keys_of)


def trained(run: Run, items: list[Batch]) -> dict[str, Tensor]:
    state = guarded(run)
    run_loop(state, items, run=run)
    return plain(state.model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told_of_in_full(value: float) -> None:
    run = small_run("none")
    state = guarded(run)
    with pytest.raises(NonFiniteLossError) as caught:
        run_loop(state, batches(value=value), run=run)
    line = str(caught.value)
    assert "at step 2, worker 0, images cat/0.jpg, cat/1.jpg" in line
    assert "blocks.1 " in line
    assert "head " in line
    assert line.endswith("or set --optim.on-nonfinite")
    # Good before it, and untouched by it.
    healthy = trained(run, batches()[:BAD])
    for name, weights in plain(state.model).items():
        assert torch.equal(weights, healthy[name]), name


@pytest.mark.parametrize(
    ("optimizer", "model"),
    [("adamw", SO_VIT), ("sgd", SO_VIT), ("sgd", MPN_COV)],
    ids=["adamw", "sgd", "eigenvalues"],
)
def test_a_step_that_is_skipped_leaves_weights_statistics_and_state(
    optimizer: str, model: Model
) -> None:
    """LAPACK raises for a matrix that is no number: no reason to die."""
    run = small_run(
        "none", model=model, optimizer=optimizer, on_nonfinite="skip", clip_grad_norm=1
    )
    state = guarded(run)
    seen: list[dict[str, Tensor]] = []

    def watched() -> Iterator[Batch]:
        for batch in batches(size=32):
            seen.append(plain(state.model))
            yield batch

    notes = looped(state, watched(), run=run).messages
    assert len(notes) == 1
    assert "steps left out: 1, 1 in all; got nan or infinity at step 2" in notes[0]
    before, after, last = seen[BAD], seen[BAD + 1], plain(state.model)
    for name, weights in before.items():
        assert torch.equal(weights, after[name]), name
    assert any(not torch.equal(last[name], after[name]) for name in last)
    assert all(weights.isfinite().all() for weights in last.values())


def test_too_many_that_are_skipped_end_the_run() -> None:
    run = small_run("none", on_nonfinite="skip", max_nonfinite_steps=0)
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        trained(run, batches())


def test_a_first_step_that_is_skipped_leaves_momentum_at_nothing() -> None:
    run = small_run("none", optimizer="sgd", on_nonfinite="skip")
    items = batches()
    after_bad = trained(run, [dataclasses.replace(items[BAD], index=0), *items[:1]])
    assert all(weights.isfinite().all() for weights in after_bad.values())


def test_going_back_is_no_error_of_the_user() -> None:
    run = small_run("none", on_nonfinite="rewind")
    with pytest.raises(RewindError, match="at step 2, worker 0"):
        trained(run, batches())


def test_gradients_alone_can_be_no_numbers() -> None:
    run = small_run("none")
    state = guarded(run)
    weight = next(state.model.parameters())
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLossError, match="at step 0, in the gradients alone"):
        run_loop(state, batches()[:1], run=run)


def test_a_bad_part_of_an_accumulated_batch_makes_the_step_bad() -> None:
    run = small_run("none", num_accumulation=2)
    images, labels = pictures(8)
    broken = images[4:].clone()
    broken[0] = math.nan
    given = {"index": 0, "global_rows": 8}
    items = [
        batch_of(images[:4], labels[:4], micro=0, ends_step=False, **given),
        batch_of(broken, labels[4:], micro=1, **given),
    ]
    with pytest.raises(NonFiniteLossError, match="at step 0, worker 0, images"):
        trained(run, items)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("blocks.3.attn.qkv.weight", "blocks.3"),
        ("backbone.layer1.0.conv1.weight", "backbone.layer1.0"),
        ("cls_token", "cls_token"),
        ("head.fc.bias", "head"),
    ],
)
def test_parameters_are_told_of_by_layers(name: str, group: str) -> None:
    assert group_of(name) == group
