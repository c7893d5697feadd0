"""A bad image costs that image, whatever is wrong with it, in either decoder."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.config import Augment, Data, PixelSettings
from pipelines.transforms.decoder import BatchDecoder, make_decoder
from pipelines.transforms.fault_isolation import SafeDecoder
from pipelines.transforms.rows import BadImage, Rows
from pipelines.transforms.sampling import Draws, draw
from tests.odd_images import GOOD, SIZE, bad_images, odd_images
from tests.small_sets import jpeg
from tests.test_dali import KINDS

CPU = torch.device("cpu")
SETTINGS = PixelSettings(
    data=Data(train="t", val="v", batch_size=8),
    augment=Augment(re_prob=0.5),
    img_size=32,
    seed=0,
    train=True,
)


def settings_of(kind: str, **changes: Any) -> PixelSettings:
    decoder = "torch" if kind == "torch" else "dali"
    data = dataclasses.replace(SETTINGS.data, decoder=decoder)
    return dataclasses.replace(SETTINGS, data=data, **changes)


def decoder_of(kind: str, **changes: Any) -> Any:
    settings = settings_of(kind, **changes)
    if kind == "graph":
        from pipelines.transforms.dali import DaliDecoder

        return DaliDecoder(settings, batch_size=8, device=CPU)
    return make_decoder(settings, batch_size=8, device=CPU)


def rows_with(encoded: Sequence[bytes], *, first_id: int = 40) -> Rows:
    num = len(encoded)
    return Rows(
        views=[np.frombuffer(data, np.uint8) for data in encoded],
        labels=np.arange(num) % 3,
        ids=np.arange(first_id, first_id + num),
        repeats=np.zeros(num, np.int64),
        heights=np.full(num, SIZE[1]),
        widths=np.full(num, SIZE[0]),
        keys=pa.array([f"photo/{i}.jpg" for i in range(num)]),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", bad_images())
def test_a_bad_image_costs_that_image(kind: str, name: str) -> None:
    rows = rows_with([GOOD, GOOD, bad_images()[name], GOOD])
    settings = settings_of(kind, train=False)
    draws = draw(rows, settings=settings, epoch=0)
    decode = SafeDecoder(decoder_of(kind, train=False).start)
    found = decode(rows, draws)
    assert found.good == [0, 1, 3]
    assert list(found.reasons) == [2]
    assert len(found.reasons[2]) > 3
    assert found.pixels is not None
    assert torch.equal(found.pixels[0], found.pixels[2])
    # The decoder goes on with the next batch, and remembers.
    whole = rows_with([GOOD] * 4, first_id=60)
    again = decode(whole, draw(whole, settings=settings, epoch=0))
    assert again.good == [0, 1, 2, 3]
    assert again.pixels is not None
    assert torch.equal(again.pixels[:3], found.pixels)
    assert decode(rows, draws).reasons == found.reasons


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_image_costs_nothing(kind: str) -> None:
    encoded = list(odd_images().values())
    decode = SafeDecoder(decoder_of(kind, train=False).start)
    for start in range(0, len(encoded), 8):
        rows = rows_with(encoded[start : start + 8], first_id=start)
        settings = settings_of(kind, train=False)
        found = decode(rows, draw(rows, settings=settings, epoch=0))
        assert found.reasons == {}
        assert found.good == list(range(len(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_that_looks_whole_costs_at_most_that_image(kind: str) -> None:
    """Only a decoder that reaches the hole can know: the rest must not depend on it."""
    from tests.odd_images import _hole_with_forged_end

    rows = rows_with([GOOD, _hole_with_forged_end(), GOOD])
    decode = SafeDecoder(decoder_of(kind).start)
    for epoch in range(6):
        draws = draw(rows, settings=settings_of(kind), epoch=epoch)
        found = decode(rows, draws)
        assert {0, 2} <= set(found.good)
        assert set(found.reasons) <= {1}


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_decoded_as_they_are(kind: str) -> None:
    """Garbage in the scan is no error to any decoder: sovit-shards can't see it."""
    scan = bytearray(GOOD)
    for at in range(len(GOOD) // 2, len(GOOD) - 20, 37):
        scan[at] = (scan[at] ^ 0x55) % 0xFF
    rows = rows_with([GOOD, bytes(scan), GOOD])
    draws = draw(rows, settings=settings_of(kind, train=False), epoch=0)
    found = SafeDecoder(decoder_of(kind, train=False).start)(rows, draws)
    assert {0, 2} <= set(found.good)


class Broken:
    """Fail always, or for one image, as told."""

    def __init__(self, fails: Any) -> None:
        self.fails, self.sizes = fails, []

    def start(
        self, encoded: Sequence[np.ndarray], draws: Draws
    ) -> Callable[[], Tensor]:
        return lambda: self._decoded(encoded, draws)

    def _decoded(self, encoded: Sequence[np.ndarray], draws: Draws) -> Tensor:
        self.sizes.append(len(encoded))
        assert len(draws.geometry.start) == len(encoded)
        if self.fails(encoded):
            raise RuntimeError("Error in pipeline\nFailed to allocate\nat line 3")
        return torch.zeros(len(encoded), 32, 32, 3, dtype=torch.uint8)


def test_what_is_not_an_images_fault_is_raised() -> None:
    rows = rows_with([GOOD] * 4)
    draws = draw(rows, settings=SETTINGS, epoch=0)
    for fails in (lambda encoded: True, lambda encoded: len(encoded) > 1):
        with pytest.raises(RuntimeError, match="allocate"):
            SafeDecoder(Broken(fails).start)(rows, draws)


def test_a_decoder_is_tried_again_after_each_error_and_reasons_are_a_line() -> None:
    """Its own pixels are no help here: it is too large, say."""
    culprit = jpeg(9, size=SIZE)
    broken = Broken(
        lambda encoded: any(v.tobytes() == culprit or v[0] == ord("P") for v in encoded)
    )
    decode = SafeDecoder(broken.start)
    rows = rows_with([GOOD, culprit, GOOD])
    draws = draw(rows, settings=SETTINGS, epoch=0)
    found = decode(rows, draws)
    assert found.reasons == {1: "the decoder refuses it: Failed to allocate"}
    assert broken.sizes == [3, 1, 1, 1, 1, 2]
    decode(rows, draws)  # it is known now: no further try
    assert broken.sizes == [3, 1, 1, 1, 1, 2, 2]


def test_what_a_decoder_refuses_alone_comes_by_the_judges_pixels() -> None:
    culprit = jpeg(9, size=SIZE)
    given: list[bytes] = []

    def fails(encoded: Sequence[np.ndarray]) -> bool:
        given[:] = [view.tobytes() for view in encoded]
        return culprit in given

    broken = Broken(fails)
    decode = SafeDecoder(broken.start)
    rows = rows_with([GOOD, culprit, GOOD])
    draws = draw(rows, settings=SETTINGS, epoch=0)
    for sizes in ([3, 1, 1, 1, 1, 3], [3, 1, 1, 1, 1, 3, 3]):  # it is known then
        found = decode(rows, draws)
        assert (found.good, found.reasons) == ([0, 1, 2], {})
        assert broken.sizes == sizes
        assert (given[0], given[2]) == (GOOD, GOOD)
        shown = np.frombuffer(given[1], np.uint8)[-3 * SIZE[0] * SIZE[1] :]
        wanted = np.asarray(Image.open(io.BytesIO(culprit)))
        assert np.array_equal(shown.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("is_whole", [True, False])
def test_what_one_batch_brought_out_mends_the_next_that_was_under_way(
    is_whole: bool,
) -> None:
    """The same image twice in a row, as repeated augmentation has it."""
    broken = bad_images()["broken Huffman table"]
    culprit = jpeg(9, size=SIZE) if is_whole else broken
    decode = SafeDecoder(Broken(lambda encoded: culprit in map(bytes, encoded)).start)
    rows = rows_with([GOOD, culprit, GOOD])
    draws = draw(rows, settings=SETTINGS, epoch=0)
    started = [decode.start(rows, draws) for _ in range(2)]
    for found in (salvage() for salvage in started):
        assert found.good == ([0, 1, 2] if is_whole else [0, 2])
        assert list(found.reasons) == ([] if is_whole else [1])


def batch_decoder(
    *, num_rows: int, on_bad: Any = lambda bad: None, **changes: Any
) -> BatchDecoder:
    settings = settings_of("torch", **changes)
    return BatchDecoder(settings, num_rows=num_rows, device=CPU, on_bad=on_bad)


def test_bad_rows_show_good_ones_with_their_labels_and_no_weight() -> None:
    told: list[BadImage] = []
    encoded = [jpeg(i, size=SIZE) for i in range(5)]
    encoded[1] = encoded[4] = b"<html>"
    decode = batch_decoder(num_rows=7, on_bad=told.extend, train=False)
    rows = rows_with(encoded)
    found = decode(rows, 0)
    assert found.images.shape == (7, 3, 32, 32)
    assert found.weights.tolist() == [1, 0, 1, 1, 0, 0, 0]
    assert found.draw_ids.tolist() == [40, -1, 42, 43, -1, -1, -1]
    assert list(found.bad) == told
    assert [(bad.row_id, bad.key) for bad in told] == [
        (41, "photo/1.jpg"),
        (44, "photo/4.jpg"),
    ]
    alone = batch_decoder(num_rows=3, train=False)(
        rows_with([encoded[i] for i in (0, 2, 3)]), 0
    )
    shown = [0, 1, 1, 2, 1, 2, 0]  # good ones in turn, each good row at its own place
    assert torch.equal(found.images, alone.images[shown])
    assert found.labels.tolist() == [[0, 2, 0][i] for i in shown]


def test_a_batch_of_bad_images_shows_the_last_good_one() -> None:
    decode = batch_decoder(num_rows=3, train=False)
    first = decode(rows_with([b"", b"<html>"]), 0)
    assert first.weights.tolist() == [0, 0, 0]
    assert first.images.abs().max() < 0.02  # the mean colour
    good = decode(rows_with([jpeg(7, size=SIZE)] * 3), 0)
    last = decode(rows_with([b"", b""]), 0)
    assert torch.equal(last.images, good.images)
    assert last.weights.tolist() == [0, 0, 0]
    assert len(last.bad) == 2
    nothing = decode(rows_with([]), 0)
    assert torch.equal(nothing.images, good.images)
    assert nothing.bad == ()


def test_erased_boxes_go_with_the_image_they_were_drawn_for() -> None:
    encoded = [jpeg(i, size=SIZE) for i in range(6)]
    whole = batch_decoder(num_rows=6)(rows_with(encoded), 0)
    encoded[2] = b""
    broken = batch_decoder(num_rows=6)(rows_with(encoded), 0)
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(broken.images[keep], whole.images[keep])
    assert not torch.equal(broken.images[2], whole.images[2])
