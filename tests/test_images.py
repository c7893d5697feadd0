"""What passes the check is what DALI decodes, and shrinking keeps the meaning."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from pipelines.shards.images import BadImageError, check_image


def picture(mode: str = "RGB", *, size: tuple[int, int] = (60, 40)) -> Image.Image:
    x = np.linspace(0, 6, size[0])
    y = np.linspace(0, 4, size[1])[:, None]
    waves = [np.sin(x * k + y) * 100 + 128 for k in (1, 2, 3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def grey16() -> Image.Image:
    return Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257)


GOOD = {
    "jpeg": encode(picture()),
    "grey": encode(picture("L")),
    "cmyk": encode(picture("CMYK")),
    "progressive": encode(picture(), progressive=True),
    "trailing garbage": encode(picture()) + b"garbage" * 99,
    "two pictures": encode(picture(), "MPO", save_all=True, append_images=[picture()]),
    "png": encode(picture("RGBA"), "PNG"),
    "png palette": encode(picture("P"), "PNG"),
    "png 16": encode(grey16(), "PNG"),
    "webp": encode(picture(), "WEBP"),
    "tiff": encode(picture(), "TIFF", compression="tiff_lzw"),
    "bmp": encode(picture(), "BMP"),
    "ppm": encode(picture(), "PPM"),
    "jp2": encode(picture(), "JPEG2000"),
}

JPEG = encode(picture(size=(320, 240)), quality=95)
SIZE_AT = JPEG.index(b"\xff\xc0") + 5
BAD = {
    "nothing": (b"", "empty file"),
    "one byte": (b"\xff", "not an image"),
    "html": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "random": (random.Random(0).randbytes(5000), "not an image"),
    "first 20 bytes": (JPEG[:20], "not an image"),
    "a tenth": (JPEG[: len(JPEG) // 10], "does not decode: .*truncated"),
    "half": (JPEG[: len(JPEG) // 2], "does not decode: .*truncated"),
    "95 %": (JPEG[: len(JPEG) * 95 // 100], "does not decode: .*truncated"),
    "no end": (JPEG[:-2], "does not decode: .*truncated"),
    "0x0": (JPEG[:SIZE_AT] + bytes(4) + JPEG[SIZE_AT + 4 :], "not an image"),
    "65500x65500": (
        JPEG[:SIZE_AT] + b"\xff\xdc\xff\xdc" + JPEG[SIZE_AT + 4 :],
        "broken header: .*decompression bomb",
    ),
    "truncated png": (encode(picture(), "PNG")[:-900], "does not decode"),
    "gif": (encode(picture(), "GIF"), "format GIF is not decoded here"),
    "avif": (encode(picture(), "AVIF"), "format AVIF is not decoded here"),
    "float tiff": (encode(picture("F"), "TIFF"), "[A-Z]+ of 32-bit samples"),
    "pfm": (encode(picture("F"), "PPM"), "[A-Z]+ of 32-bit samples"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images_keep_their_bytes(name: str) -> None:
    checked = check_image(GOOD[name])
    assert checked.data is GOOD[name]
    assert (checked.width, checked.height) == (60, 40)


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_named(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImageError, match=f"^{reason}"):
        check_image(data)


@pytest.mark.parametrize("name", ["a tenth", "half", "95 %", "no end"])
def test_the_header_check_misses_only_forged_ends(name: str) -> None:
    data, _ = BAD[name]
    with pytest.raises(BadImageError, match="end-of-image"):
        check_image(data, full=False)
    assert check_image(data + b"\xff\xd9", full=False).width == 320


def test_dali_decodes_what_passes_and_no_other_format() -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import types
    from nvidia.dali.pipeline import pipeline_def

    def decodes(data: bytes) -> bool:
        # Without a device; the annotation knows only int.
        @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # pyright: ignore
        def decode():
            return fn.decoders.image(
                types.Constant(np.frombuffer(data, np.uint8), device="cpu"),
                device="cpu",
            )

        try:
            (images,) = decode().run()
        except RuntimeError:
            return False
        return images.shape()[0][:2] == (40, 60)

    assert [name for name, data in GOOD.items() if not decodes(data)] == []
    # Broken bytes are left to the table above; these are whole, in other formats.
    assert [name for name in ("gif", "avif", "pfm") if decodes(BAD[name][0])] == []


def test_shrinking_keeps_the_picture() -> None:
    checked = check_image(JPEG, short_side=60, quality=95)
    image = Image.open(io.BytesIO(checked.data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (80, 60))
    assert (checked.width, checked.height) == (80, 60)
    wanted = np.asarray(picture(size=(320, 240)).resize((80, 60)), dtype=int)
    assert np.abs(np.asarray(image) - wanted).mean() < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_shrinking_keeps_the_orientation_and_turns_nothing(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    data = encode(picture(size=(320, 240)), form, exif=exif)
    checked = check_image(data, short_side=60)
    image = Image.open(io.BytesIO(checked.data))
    assert image.size == (checked.width, checked.height) == (80, 60)
    assert dict(image.getexif()) == {0x0112: 6}


def test_small_images_keep_their_bytes_when_shrinking() -> None:
    assert check_image(JPEG, short_side=240).data is JPEG
    assert check_image(JPEG, short_side=239).data is not JPEG


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16"])
def test_every_mode_shrinks_to_rgb(mode: str) -> None:
    image = grey16() if mode == "I;16" else picture(mode)
    form = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    checked = check_image(encode(image, form), short_side=30)
    shrunk = Image.open(io.BytesIO(checked.data))
    assert (shrunk.format, shrunk.mode, shrunk.size) == ("JPEG", "RGB", (45, 30))
    wanted = picture("L" if mode in ("L", "I;16") else "RGB").resize((45, 30))
    difference = np.asarray(shrunk, dtype=int) - np.asarray(wanted.convert("RGB"))
    assert np.abs(difference).mean() < 12  # a palette of 216 colours is 9 off


def test_a_turned_tiff_gives_its_stored_size_and_its_bytes() -> None:
    data = encode(picture(), "TIFF", tiffinfo={0x0112: 6})
    checked = check_image(data, short_side=20)
    assert (checked.width, checked.height) == (60, 40)
    assert checked.data is data
