"""Every way to read an image gives the same pixels, or refuses it for one reason."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps

from pipelines.config import Exif, PixelSettings
from pipelines.export.images import Encoded, decode
from pipelines.shards.images import check_image
from pipelines.transforms.cpu import HostDecoder
from pipelines.transforms.crops import Geometry, center_crop
from pipelines.transforms.decoder import (
    BatchDecoder,
    ReaderDecoder,
    decode_eval,
    make_decoder,
)
from pipelines.transforms.fault_isolation import SafeDecoder, screen
from pipelines.transforms.headers import BadImageError, read_header
from pipelines.transforms.pillow_decode import (
    decode_image,
    orientation_of,
    pillow_windows,
    stored_size,
)
from pipelines.transforms.rows import Rows, nested
from pipelines.transforms.sampling import Draws, draw
from tests.image_kinds import (
    HEIGHT,
    WIDTH,
    encode,
    image_kinds,
    png,
    refused_kinds,
    tiff,
    waves,
)
from tests.test_dali import KINDS, needs_dali
from tests.test_salvage import CPU, decoder_of, settings_of

DECODED, REFUSED = image_kinds(), refused_kinds()


def rows_of(encoded: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> Rows:
    num = len(encoded)
    return Rows(
        views=[np.frombuffer(data, np.uint8) for data in encoded],
        labels=np.zeros(num, np.int64),
        ids=np.arange(num),
        repeats=np.zeros(num, np.int64),
        heights=np.array([height for height, _ in sizes]),
        widths=np.array([width for _, width in sizes]),
        keys=pa.array([str(at) for at in range(num)]),
    )


def whole(num: int) -> Geometry:
    size, start = np.array([[HEIGHT, WIDTH]] * num), np.zeros((num, 2), np.int64)
    flags = np.zeros(num, bool)
    return Geometry(
        start=start, window=size, resized=size, bicubic=flags, crop=start, flip=flags
    )


def settings(kind: str, *, exif: Exif = "ignore") -> PixelSettings:
    found = settings_of(kind, train=False)
    return dataclasses.replace(found, data=dataclasses.replace(found.data, exif=exif))


@pytest.mark.parametrize("name", DECODED)
def test_a_kind_shows_what_it_was_made_of(name: str) -> None:
    data, wanted, levels = DECODED[name]
    checked = check_image(data)
    assert checked.data is data
    assert (checked.height, checked.width) == (HEIGHT, WIDTH)
    assert screen(np.frombuffer(data, np.uint8), height=HEIGHT, width=WIDTH) == ""
    found = decode_image(data)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).mean() <= levels


@needs_dali
def test_dalis_windows_are_the_judges_bit_for_bit() -> None:
    """Without help from who calls it, on threads too, and of a part of an image."""
    from pipelines.transforms.dali import DaliWindows

    views = [np.frombuffer(kind.data, np.uint8) for kind in DECODED.values()]
    geometry = whole(len(views))
    shift, narrower = np.array([2, 5]), np.array([6, 9])
    part = dataclasses.replace(
        geometry, start=geometry.start + shift, window=geometry.window - narrower
    )
    decodes = DaliWindows(batch_size=len(views), num_threads=2), pillow_windows
    for cut in (geometry, part):
        pairs = zip(*(decode(views, cut) for decode in decodes), strict=True)
        for name, (found, wanted) in zip(DECODED, pairs, strict=True):
            assert torch.equal(found, wanted), name


@pytest.mark.parametrize("kind", KINDS[:2])
def test_readers_evaluation_and_prediction_agree(kind: str) -> None:
    """And the registered model, which is `decode_eval` too."""
    encoded = [kind.data for kind in DECODED.values()]
    rows = rows_of(encoded, [(HEIGHT, WIDTH)] * len(encoded))
    given = settings(kind)
    size, data = given.img_size, given.data
    images = BatchDecoder(given, num_rows=len(encoded), device=CPU)(rows, 0)
    wanted = decode_eval(encoded, data=data, img_size=size)
    assert images.bad == ()
    assert torch.equal(images.images, wanted)
    read = ReaderDecoder(given, batch_size=32)(table_of(rows))
    pixels = read["pixels"].chunk(0).flatten().to_pylist()
    safe = SafeDecoder(decoder_of(kind, train=False).start)
    for start in range(0, len(encoded), 8):
        part = rows.cut(start, start + 8)
        found = safe(part, draw(part, settings=given, epoch=0)).pixels
        assert found is not None
        assert found.numpy().tobytes() == b"".join(pixels[start : start + 8])
    for at in (0, len(encoded) - 1):
        one = Encoded(name="x", content=encoded[at])
        assert torch.equal(decode(one, data=data, img_size=size), wanted[at])


def table_of(rows: Rows) -> pa.Table:
    contents = pa.array([view.tobytes() for view in rows.views], pa.large_binary())
    cells = {
        "image": contents,
        "label": pa.array(rows.labels),
        "row_id": pa.array(rows.ids),
        "repeat": pa.array(rows.repeats),
        "height": pa.array(rows.heights),
        "width": pa.array(rows.widths),
        "key": rows.keys,
    }
    columns = {name: nested(values) for name, values in cells.items()}
    return pa.table(columns | {"epoch": pa.array([0])})


@needs_dali
def test_the_graph_of_a_gpu_is_given_the_judges_pixels() -> None:
    """Its resize is its own: what is held is that it sees the same image."""
    safe = SafeDecoder(decoder_of("graph", train=False).start)
    names = list(DECODED)
    for start in range(0, len(names), 8):
        some = names[start : start + 8]
        encoded = [DECODED[name].data for name in some]
        same = [encode(decode_image(data), "PNG") for data in encoded]
        sizes = [(HEIGHT, WIDTH)] * len(some)
        found, wanted = (
            safe(rows, draw(rows, settings=settings("graph"), epoch=0))
            for rows in (rows_of(encoded, sizes), rows_of(same, sizes))
        )
        assert found.pixels is not None
        assert wanted.pixels is not None
        for at, name in enumerate(some):
            assert torch.equal(found.pixels[at], wanted.pixels[at]), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_is_refused_for_one_reason(kind: str) -> None:
    good = png([row.tobytes() for row in waves()], color=2)
    safe = SafeDecoder(decoder_of(kind, train=False).start)
    data = settings(kind).data
    for at, (bad, wanted) in enumerate(REFUSED.values()):
        with pytest.raises(BadImageError, match=wanted) as caught:
            check_image(bad)
        reason = str(caught.value)
        sizes = [(HEIGHT, WIDTH)] * 3
        rows = rows_of([good, bad, good], sizes)
        rows = dataclasses.replace(rows, ids=rows.ids + 3 * at)
        found = safe(rows, draw(rows, settings=settings(kind), epoch=0))
        assert (found.good, found.reasons) == ([0, 2], {1: reason})
        with pytest.raises(BadImageError, match=re.escape(reason)):
            decode(Encoded(name="x", content=bad), data=data, img_size=32)


def turned_images() -> dict[str, bytes]:
    images = {}
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        images |= {
            f"JPEG {turn}": encode(waves(), "JPEG", exif=exif),
            f"PNG {turn}": encode(waves(), "PNG", exif=exif),
            f"WebP {turn}": encode(waves(), "WEBP", lossless=True, exif=exif),
            f"TIFF {turn}": tiff(waves(), t274=turn),
            f"big-endian TIFF {turn}": tiff(waves(), order=">", t274=turn),
            f"BigTIFF {turn}": tiff(waves(), big=True, t274=turn),
        }
    return images


def test_exif_turns_as_pillow_does_and_only_where_asked() -> None:
    for name, data in turned_images().items():
        turn = int(name[-1])
        assert orientation_of(memoryview(data)) == turn, name
        stored = decode_image(data)
        assert stored.shape == (HEIGHT, WIDTH, 3)
        exif = Image.Exif()
        exif[0x0112] = turn
        plain = Image.open(io.BytesIO(encode(stored, "PNG", exif=exif)))
        wanted = np.asarray(ImageOps.exif_transpose(plain))
        found = decode_image(data, exif="rotate")
        assert np.array_equal(found, wanted), name
        assert stored_size(data, exif="rotate") == wanted.shape[:2]
        assert stored_size(data) == (HEIGHT, WIDTH)
        other = check_image(data)
        assert (other.data, other.height, other.width) == (data, HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_turns_alike(kind: str) -> None:
    encoded = list(turned_images().values())
    rows = rows_of(encoded, [(HEIGHT, WIDTH)] * len(encoded))
    upright = [encode(decode_image(data, exif="rotate"), "PNG") for data in encoded]
    sizes = [decode_image(data).shape[:2] for data in upright]
    plain = rows_of(upright, [(height, width) for height, width in sizes])
    safe = SafeDecoder(decoder_of_exif(kind).start, exif="rotate")
    for start in range(0, len(encoded), 8):
        part, same = (some.cut(start, start + 8) for some in (rows, plain))
        given = settings(kind, exif="rotate")
        found, wanted = (
            safe(some, draw(some, settings=given, epoch=0)) for some in (part, same)
        )
        assert found.reasons == {}
        assert found.pixels is not None
        assert wanted.pixels is not None
        assert torch.equal(found.pixels, wanted.pixels)
    data = settings(kind, exif="rotate").data
    assert torch.equal(
        decode_eval(encoded, data=data, img_size=32),
        decode_eval(upright, data=data, img_size=32),
    )


def decoder_of_exif(kind: str) -> Any:
    given = settings(kind, exif="rotate")
    if kind == "graph":
        from pipelines.transforms.dali import DaliDecoder

        return DaliDecoder(given, batch_size=8, device=CPU)
    return make_decoder(given, batch_size=8, device=CPU)


def test_a_tag_that_cannot_be_read_turns_nothing() -> None:
    assert orientation_of(memoryview(b"")) == 1
    for data in (DECODED["JPEG broken EXIF"].data, b"MM\0*" + bytes(3), b"II*\0"):
        assert orientation_of(memoryview(data)) == 1
    assert orientation_of(memoryview(tiff(waves(), t274=9))) == 1


def photo(*, grey: bool = False, **settings: Any) -> bytes:
    noise = np.random.default_rng(2).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    return encode(noise[..., 0] if grey else noise, "JPEG", quality=80, **settings)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["plain", "whole chroma", "restarts", "grey"])
def test_the_full_check_finds_a_scan_that_ends_early(share: float, name: str) -> None:
    """Though it has its end marker: decoders fill the rest with grey."""
    options = {
        "whole chroma": {"subsampling": 0},
        "restarts": {"restart_marker_rows": 1},
    }
    data = photo(grey=name == "grey", **options.get(name, {}))
    assert check_image(data).data is data
    cut = data[: int(len(data) * share)] + b"\xff\xd9"
    with pytest.raises(BadImageError, match=r"cut short|restart markers are missing"):
        check_image(cut)
    assert check_image(cut, full=False).data is cut


def test_the_full_check_finds_holes_and_takes_grey_for_what_it_is() -> None:
    data = photo(restart_marker_rows=1)
    at = data.index(b"\xff\xd1")
    with pytest.raises(BadImageError, match="restart markers are missing"):
        check_image(data[: at - 40] + data[at + 40 :])
    grey = np.full((32, 40, 3), 128, np.uint8)
    for options in ({}, {"restart_marker_rows": 1}, {"progressive": True}):
        for pixels in (grey, grey[..., 0]):
            whole_grey = encode(pixels, "JPEG", **options)
            assert check_image(whole_grey).data is whole_grey


@pytest.mark.parametrize("size", [(2, 20_000), (20_000, 2), (3, 50_001), (1, 65_000)])
def test_a_thread_of_pixels_costs_no_memory(size: tuple[int, int]) -> None:
    """The middle is what the whole would show, to a pixel of a slow wave."""
    height, width = size
    long = np.sin(np.arange(max(size)) / 9) * 100 + 128
    row = long[None] if width > height else long[:, None]
    pixels = np.repeat(
        np.broadcast_to(row, size).astype(np.uint8)[..., None], 3, axis=2
    )
    given: dict[str, Any] = {"img_size": 224, "crop_pct": 0.875}
    geometry = center_crop(
        heights=np.array([height]),
        widths=np.array([width]),
        interpolation="bicubic",
        **given,
    )
    assert geometry.resized.prod() < 1 << 21
    decoded = HostDecoder(pillow_windows, img_size=224, fill=(0, 0, 0), num_threads=1)
    draws = Draws(geometry=geometry, ops=None, boxes=None)
    found = decoded([np.frombuffer(encode(pixels, "PNG"), np.uint8)], draws)[0]
    # What lies 112 pixels of the crop around the middle, of 256 a short side.
    reach = 112 * min(size) / 256
    middle = max(size) / 2
    places = np.linspace(middle - reach, middle + reach, 224) - 0.5
    wanted = np.interp(places, np.arange(max(size)), long)
    line = found[112, :, 0] if width > height else found[:, 112, 0]
    assert np.abs(line.numpy() - wanted).max() < 4


def test_a_banner_costs_itself_where_it_is_shrunk() -> None:
    banner = encode(Image.new("1", (140_000, 4)), "PNG")
    with pytest.raises(BadImageError, match="140000x4 pixels, 70000x2 of them"):
        check_image(banner, short_side=2)
    assert check_image(banner).data is banner


def test_sizes_of_headers_are_those_of_pixels() -> None:
    """Of one pixel, of long and of odd sides, in each format that is read here."""
    for width, height in ((1, 1), (1, 70), (70, 1), (5, 3), (300, 257)):
        pixels = np.zeros((height, width, 3), np.uint8)
        for form, options in (
            *(("JPEG", {}), ("PNG", {}), ("PPM", {}), ("BMP", {}), ("TIFF", {})),
            *(("WEBP", {}), ("WEBP", {"lossless": True}), ("JPEG2000", {})),
            ("WEBP", {"exif": b"Exif\0\0"}),
        ):
            data = encode(pixels, form, **options)
            header = read_header(memoryview(data))
            assert (header.format, header.height, header.width) == (form, height, width)
            assert decode_image(data).shape == (height, width, 3)
            assert data == check_image(data).data
