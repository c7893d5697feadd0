"""Two batches on their way through DALI at once: what a GPU runs, on the CPU backend.

A batch's pixels and errors are its own, whatever becomes of the one beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from pipelines.config import Augment
from pipelines.data.prefetch import taken_ahead
from pipelines.transforms.fault_isolation import SafeDecoder, Salvaged
from pipelines.transforms.rows import Rows
from pipelines.transforms.sampling import Draws, draw
from tests.odd_images import SIZE, bad_images
from tests.small_sets import jpeg
from tests.test_dali import HAS_DALI
from tests.test_salvage import rows_with, settings_of

if not HAS_DALI:
    pytest.skip("DALI has no wheel here", allow_module_level=True)

import nvidia.dali.fn as fn
from nvidia.dali.pipeline import Pipeline

from pipelines.transforms import dali
from pipelines.transforms.dali import DaliDecoder, DaliWindows, define_pixels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SETTINGS = settings_of("dali", augment=Augment(auto_augment="rand-m9-n1"))
NUM_ROWS = 4
# To the screen it looks whole.
BAD = bad_images()["broken Huffman table"]


def decoder() -> DaliDecoder:
    return DaliDecoder(SETTINGS, batch_size=NUM_ROWS, device=CPU)


def batch_of(number: int, *, bad: tuple[int, ...] = ()) -> tuple[Rows, Draws]:
    """Rows that no other number has, with a bad image at some places."""
    encoded = [jpeg(10 * number + at, size=SIZE) for at in range(NUM_ROWS)]
    for at in bad:
        encoded[at] = BAD
    rows = rows_with(encoded, first_id=100 * number)
    return rows, draw(rows, settings=SETTINGS, epoch=0)


@pytest.fixture(scope="module")
def whole() -> list[tuple[Rows, Draws, torch.Tensor]]:
    """Batches and their pixels, each decoded by itself."""
    decode = decoder()
    found = [batch_of(number) for number in range(4)]
    return [(rows, draws, decode(rows.views, draws)) for rows, draws in found]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_each_batch_gives_its_own_pixels_in_whichever_order(
    whole: list[tuple[Rows, Draws, torch.Tensor]], order: tuple[int, ...]
) -> None:
    decode = decoder()
    started = [decode.start(rows.views, draws) for rows, draws, _ in whole]
    for at in order:
        assert torch.equal(started[at](), whole[at][2])
        assert torch.equal(started[at](), whole[at][2])
    assert torch.equal(started[3](), whole[3][2])


def test_the_next_batch_is_under_way_before_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Noting(Pipeline):
        def schedule_run(self) -> None:
            calls.append(("start",))
            super().schedule_run()

        def outputs(self, *given: Any, **named: Any) -> Any:
            calls.append(("wait", *given, *named))
            return super().outputs(*given, **named)

    decode = decoder()
    assert decode._pipeline is not None
    monkeypatch.setattr(decode._pipeline, "__class__", Noting)
    found = [batch_of(number) for number in range(3)]
    started = (decode.start(rows.views, draws) for rows, draws in found)
    for pixels in taken_ahead(started, num_ahead=decode.num_ahead):
        pixels()
    # None is the CPU's stream, where DALI takes a stream.
    start, wait = ("start",), ("wait", None)
    assert calls == [start, start, wait, start, wait, wait]


def salvaged(
    batches: list[tuple[Rows, Draws]], *, num_ahead: int
) -> tuple[list[Salvaged], int]:
    """What a training makes of batches, and how often its pipeline was built anew."""
    decode = decoder()
    num_resets = 0

    def reset() -> None:
        nonlocal num_resets
        num_resets += 1
        DaliDecoder.reset(decode)

    decode.reset = reset
    safe = SafeDecoder(decode.start)
    assert decode.num_ahead == 1
    started = (safe.start(rows, draws) for rows, draws in batches)
    found = [salvage() for salvage in taken_ahead(started, num_ahead=num_ahead)]
    return found, num_resets


@pytest.mark.parametrize(
    "bad", [{0: (2,)}, {1: (0, 3)}, {0: (1,), 1: (2,)}, {1: (0,), 2: (0, 1), 4: (3,)}]
)
def test_a_bad_image_costs_that_image_of_its_own_batch(
    bad: dict[int, tuple[int, ...]],
) -> None:
    batches = [batch_of(number, bad=bad.get(number, ())) for number in range(5)]
    alone, _ = salvaged(batches, num_ahead=0)
    ahead, num_resets = salvaged(batches, num_ahead=1)
    assert num_resets > 0  # the screen did not see it
    for number, (one, other) in enumerate(zip(ahead, alone, strict=True)):
        assert tuple(one.reasons) == bad.get(number, ())
        assert one.reasons == other.reasons
        assert one.good == other.good
        assert one.pixels is not None
        assert other.pixels is not None
        assert torch.equal(one.pixels, other.pixels)


def test_windows_come_of_a_new_pipeline_after_an_error() -> None:
    windows = DaliWindows(batch_size=NUM_ROWS, num_threads=1)
    rows, draws = batch_of(0, bad=(1,))
    before = windows._pipeline
    with pytest.raises(RuntimeError):
        windows(rows.views, draws.geometry)
    assert windows._pipeline is not before
    rows, draws = batch_of(1)
    assert len(windows(rows.views, draws.geometry)) == NUM_ROWS


def test_what_dali_does_not_even_take_is_the_batchs_own_error() -> None:
    decode = decoder()
    (rows, draws), (others, other_draws) = batch_of(0), batch_of(1)
    wanted = decode(rows.views, draws)
    first = decode.start(rows.views, draws)
    second = decode.start([*others.views] * 2, other_draws)  # more than it may be
    third = decode.start(others.views, other_draws)
    assert torch.equal(first(), wanted)
    with pytest.raises(RuntimeError, match="batch size"):
        second()
    assert torch.equal(third(), decode(others.views, other_draws))


def test_the_device_says_which_stream_dali_makes_pixels_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode = decoder()
    (rows, draws) = batch_of(0)
    monkeypatch.setattr(dali, "current_stream", lambda device: f"stream of {device}")
    with pytest.raises(TypeError, match="stream of cpu"):
        decode(rows.views, draws)


def test_a_gpus_pipeline_is_defined_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but the kernels: DALI checks each operator's arguments as it is added."""
    asked: list[dict[str, Any]] = []
    image_slice: Any = fn.decoders.image_slice

    def noting(*inputs: Any, **named: Any) -> Any:
        asked.append(named)
        return image_slice(*inputs, **named)

    monkeypatch.setattr(fn.decoders, "image_slice", noting)
    for train in (True, False):
        settings = dataclasses.replace(SETTINGS, train=train)
        define_pixels(settings, batch_size=NUM_ROWS, device=GPU)
    assert [named["device"] for named in asked] == ["mixed", "mixed"]
    # The same pixels whichever images are beside: the engine takes a share of a batch.
    assert [named["hw_decoder_load"] for named in asked] == [0.0, 0.0]
    with Pipeline(batch_size=NUM_ROWS, num_threads=1, device_id=0):
        plain = dataclasses.replace(SETTINGS, train=False)
        assert dali._pixels(plain, on_gpu=True).device == "gpu"
        assert dali._pixels(plain, on_gpu=False).device == "cpu"
