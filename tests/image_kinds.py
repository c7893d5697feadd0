"""Build images of odd kinds by code, each with its expected pixels.

The pixels follow from how the bytes were made, not from a decoder.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 24, 18


class Kind(NamedTuple):
    """An image's bytes, and its expected uint8 (H, W, 3)."""

    data: bytes
    pixels: np.ndarray
    levels: float = 0
    """Allowed mean difference of the pixels: its encoder's loss."""


def waves() -> np.ndarray:
    """Draw the picture that most of them show: uint8 (H, W, 3)."""
    x, y = np.linspace(0, 2, WIDTH), np.linspace(0, 1.5, HEIGHT)[:, None]
    return np.stack([np.sin(x * k + y) * 100 + 128 for k in (1, 2, 3)], -1).astype(
        np.uint8
    )


def shown(grey: np.ndarray) -> np.ndarray:
    """Convert grey levels (H, W) to RGB."""
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def encode(pixels: np.ndarray | Image.Image, form: str, **settings: Any) -> bytes:
    """Encode with Pillow."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    """Build a chunk of a PNG."""
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(
    rows: Sequence[bytes],
    *,
    color: int,
    depth: int = 8,
    before: bytes = b"",
    after: bytes = b"",
    interlace: int = 0,
    crc: int | None = None,
) -> bytes:
    """Write a PNG of WIDTH x HEIGHT from its packed rows."""
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, interlace)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", head) + before + chunk(b"IDAT", data, crc=crc) + after
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def packed(values: np.ndarray, *, bits: int) -> list[bytes]:
    """Pack rows of values of 1, 2 or 4 bits."""
    planes = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in planes]


def interlaced(pixels: np.ndarray) -> list[bytes]:
    """Order rows in Adam7's passes."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2))
    passes = (*passes, (0, 1, 2, 2), (1, 0, 2, 1))
    return [
        row.tobytes()
        for top, left, down, across in passes
        for row in pixels[top::down, left::across]
    ]


def tiff(
    pixels: np.ndarray,
    *,
    big: bool = False,
    order: Literal["<", ">"] = "<",
    **tags: int,
) -> bytes:
    """Write a TIFF of one strip from (H, W) or (H, W, 3) of any type.

    Args:
        big: BigTIFF, with offsets of 64 bits.
        order: "<" or ">".
        tags: More tags, by names `tNUMBER`, of one short number each.
    """
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    start = 16 if big else 8
    entries = {
        **{256: WIDTH, 257: HEIGHT, 258: pixels.dtype.itemsize * 8, 259: 1},
        **{262: 2 if channels == 3 else 1, 273: start, 277: channels, 278: HEIGHT},
        279: len(data),
        **{int(name[1:]): value for name, value in tags.items()},
    }
    mark = b"II" if order == "<" else b"MM"
    count, number, pad = ("Q", "Q", "4x") if big else ("H", "I", "")
    head = struct.pack(f"{order}HHHQ", 43, 8, 0, start + len(data))
    if not big:
        head = struct.pack(f"{order}HI", 42, start + len(data))
    directory = struct.pack(f"{order}{count}", len(entries))
    for tag, value in sorted(entries.items()):
        many = channels if tag == 258 and channels < 3 else 1
        kind, value_format = (4, f"I{pad}") if tag in (273, 279) else (3, f"H2x{pad}")
        directory += struct.pack(f"{order}HH{number}", tag, kind, many)
        directory += struct.pack(f"{order}{value_format}", value)
    return mark + head + data + directory + bytes(8)


def segment(marker: int, data: bytes) -> bytes:
    """Build a segment of a JPEG."""
    return bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data


def _pngs() -> dict[str, Kind]:
    color, rng = waves(), np.random.default_rng(0)
    grey, rows = color[..., 0], [row.tobytes() for row in waves()]
    deep = rng.integers(0, 1 << 16, (HEIGHT, WIDTH), dtype=np.uint16)
    deep3 = rng.integers(0, 1 << 16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    scaled = np.rint(deep / 257)
    alpha = rng.integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    palette = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    places = rng.integers(0, 16, (HEIGHT, WIDTH))
    plte = chunk(b"PLTE", palette.tobytes())
    bomb = b"k\0\0" + zlib.compress(bytes(4 << 20))

    def deep_rows(*channels: np.ndarray) -> list[bytes]:
        return [row.astype(">u2").tobytes() for row in np.dstack(channels)]

    return {
        "PNG": Kind(png(rows, color=2), color),
        "PNG interlaced": Kind(png(interlaced(color), color=2, interlace=1), color),
        **{
            f"PNG grey {bits} bits": Kind(
                png(packed(grey >> 8 - bits, bits=bits), color=0, depth=bits),
                shown((grey >> 8 - bits) * (255 // (2**bits - 1))),
            )
            for bits in (1, 2, 4)
        },
        "PNG 16 grey": Kind(png(deep_rows(deep), color=0, depth=16), shown(scaled)),
        "PNG 16 grey alpha": Kind(
            png(deep_rows(deep, deep), color=4, depth=16), shown(scaled), 0.6
        ),
        "PNG 16 RGB": Kind(
            png(deep_rows(deep3), color=2, depth=16), np.rint(deep3 / 257), 0.6
        ),
        "PNG 16 RGBA": Kind(
            png(deep_rows(deep3, deep), color=6, depth=16), np.rint(deep3 / 257), 0.6
        ),
        "PNG RGBA": Kind(encode(np.dstack([color, alpha]), "PNG"), color),
        "PNG LA": Kind(encode(np.dstack([grey, alpha]), "PNG"), shown(grey)),
        "PNG palette": Kind(
            png(packed(places, bits=4), color=3, depth=4, before=plte), palette[places]
        ),
        "PNG palette, transparent": Kind(
            png(
                packed(places, bits=4),
                color=3,
                depth=4,
                before=plte + chunk(b"tRNS", bytes(range(0, 256, 16))),
            ),
            palette[places],
        ),
        "PNG one colour transparent": Kind(
            png(rows, color=2, before=chunk(b"tRNS", struct.pack(">3H", *color[0, 0]))),
            color,
        ),
        "PNG large profile": Kind(
            png(rows, color=2, before=chunk(b"iCCP", bomb)), color
        ),
        "PNG large text": Kind(png(rows, color=2, before=chunk(b"zTXt", bomb)), color),
        "PNG large text behind": Kind(
            png(rows, color=2, after=chunk(b"zTXt", bomb)), color
        ),
        "PNG wrong checksum": Kind(png(rows, color=2, crc=1), color),
        "PNG unknown chunk": Kind(
            png(rows, color=2, before=chunk(b"ABCD", b"x")), color
        ),
        "PNG end without checksum": Kind(png(rows, color=2)[:-4], color),
        "PNG black": Kind(
            png([bytes(3 * WIDTH)] * HEIGHT, color=2), np.zeros_like(color)
        ),
        "PNG animated": Kind(
            encode(
                color, "PNG", save_all=True, append_images=[Image.fromarray(~color)]
            ),
            color,
        ),
    }


def _plain_files() -> dict[str, Kind]:
    color, rng = waves(), np.random.default_rng(1)
    grey, size = color[..., 0], b"%d %d" % (WIDTH, HEIGHT)
    bits = grey > 128
    deep = rng.integers(0, 1 << 16, (HEIGHT, WIDTH), dtype=np.uint16)
    deep3 = rng.integers(0, 1 << 16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    hundred = rng.integers(0, 101, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pages: Any = {"save_all": True, "append_images": [Image.fromarray(~color)]}
    five = color.astype(np.uint16) >> 3
    info = struct.pack("<IiiHH24x", 40, WIDTH, HEIGHT, 1, 16)
    bmp = b"BM" + struct.pack("<IHHI", 54 + 2 * WIDTH * HEIGHT, 0, 0, 54) + info
    bmp += (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2])[::-1].tobytes()
    return {
        "BMP": Kind(encode(color, "BMP"), color),
        "BMP 1 bit": Kind(encode(Image.fromarray(bits), "BMP"), shown(bits * 255)),
        "BMP 5 bits a colour": Kind(bmp, np.rint(five * 255 / 31), 1),
        "PPM": Kind(encode(color, "PPM"), color),
        "PPM with a comment": Kind(
            b"P6\n# made by hand\n" + size + b"\n255\n" + color.tobytes(), color
        ),
        "PPM ASCII": Kind(
            b"P3\n" + size + b"\n255\n" + b" ".join(b"%d" % v for v in color.flat),
            color,
        ),
        "PPM up to 100": Kind(
            b"P6 " + size + b" 100\n" + hundred.tobytes(), np.rint(hundred * 2.55), 0.6
        ),
        "PPM 16": Kind(
            b"P6 " + size + b" 65535\n" + deep3.astype(">u2").tobytes(),
            np.rint(deep3 / 257),
            0.6,
        ),
        "PGM 16": Kind(
            b"P5 " + size + b" 65535\n" + deep.astype(">u2").tobytes(),
            shown(np.rint(deep / 257)),
        ),
        "PBM": Kind(encode(Image.fromarray(bits), "PPM"), shown(bits * 255)),
        "TIFF": Kind(tiff(color), color),
        "TIFF big-endian": Kind(tiff(color, order=">"), color),
        "BigTIFF": Kind(tiff(color, big=True), color),
        "TIFF LZW": Kind(encode(color, "TIFF", compression="tiff_lzw"), color),
        "TIFF group 4": Kind(
            encode(Image.fromarray(bits), "TIFF", compression="group4"),
            shown(bits * 255),
        ),
        "TIFF white is 0": Kind(tiff(255 - grey, t262=0), shown(grey)),
        "TIFF 16 grey": Kind(tiff(deep), shown(np.rint(deep / 257))),
        "TIFF 16 grey, big-endian": Kind(
            tiff(deep, order=">"), shown(np.rint(deep / 257))
        ),
        "TIFF 16 RGB": Kind(tiff(deep3), np.rint(deep3 / 257), 0.6),
        "TIFF pages": Kind(encode(color, "TIFF", **pages), color),
        "TIFF CMYK": Kind(
            encode(Image.fromarray(color).convert("CMYK"), "TIFF"), color
        ),
        **{
            f"TIFF turned {turn}": Kind(tiff(color, t274=turn), color)
            for turn in range(2, 9)
        },
        "JPEG 2000": Kind(encode(color, "JPEG2000"), color),
        "JPEG 2000 grey": Kind(encode(grey, "JPEG2000"), shown(grey)),
        "JPEG 2000 16 grey": Kind(encode(deep, "JPEG2000"), shown(np.rint(deep / 257))),
        "WebP": Kind(encode(color, "WEBP", lossless=True), color),
        "WebP lossy": Kind(encode(color, "WEBP", quality=95), color, 5),
        "WebP alpha": Kind(
            encode(np.dstack([color, grey]), "WEBP", lossless=True, exact=True), color
        ),
        "WebP animated": Kind(encode(color, "WEBP", lossless=True, **pages), color),
    }


# The waves at quality 60, arithmetic coding: Pillow reads it and does not write it.
ARITHMETIC = (
    "ffd8ffe000104a46494600010100000100010000ffdb0043000d090a0b0a080d0b0a0b0e0e0d0f13"
    "201513121213271c1e17202e2931302e292d2c333a4a3e333646372c2d405741464c4e525352323e"
    "5a615a50604a51524fffdb0043010e0e0e131113261515264f352d354f4f4f4f4f4f4f4f4f4f4f4f"
    "4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4f4fffc9"
    "0011080012001803011100021101031101ffcc000a0010100501101105ffda000c03010002110311"
    "003f00d2661ccb20268e5329ccf64f0c447465f4a37ff3754df3536908ad54ef9060c3e900bcdecb"
    "9bab8cbe5e7c14ef5cf368d0afda6a8f84c09ccb439b4b3d23b8b40c56c01cf569d8144de4d67ba5"
    "46cb034ce3d78e5bc366ea02d2ced8c2628f918f7a85792bda671e63c2bb812715e4ffd9"
)


def _jpegs() -> dict[str, Kind]:
    color = waves()
    grey, rgb = color[..., 0], Image.fromarray(color)
    plain = encode(color, "JPEG", quality=95, subsampling=0)
    tables = plain.index(b"\xff\xdb")
    exif = Image.Exif()
    exif[0x0112] = 6
    small = encode(color[:8, :8], "JPEG")
    odd = {
        "JPEG": plain,
        "JPEG progressive": encode(
            color, "JPEG", quality=95, subsampling=0, progressive=True
        ),
        "JPEG restarts": encode(
            color, "JPEG", quality=95, subsampling=0, restart_marker_blocks=1
        ),
        "JPEG CMYK": encode(rgb.convert("CMYK"), "JPEG", quality=95),
        "JPEG RGB": encode(color, "JPEG", quality=95, keep_rgb=True),
        "JPEG arithmetic": bytes.fromhex(ARITHMETIC),
        "JPEG EXIF": encode(color, "JPEG", quality=95, subsampling=0, exif=exif),
        "JPEG two pictures": encode(
            color,
            "MPO",
            quality=95,
            subsampling=0,
            save_all=True,
            append_images=[Image.fromarray(~color)],
        ),
        "JPEG trailing": plain + bytes(99),
        "JPEG fill bytes": plain[:2] + b"\xff\xff" + plain[2:],
        "JPEG junk between segments": plain[:tables] + b"\0\1\2" + plain[tables:],
        "JPEG thumbnail": plain[:2] + segment(0xE1, b"t\0" + small) + plain[2:],
        "JPEG broken EXIF": plain[:2] + segment(0xE1, b"Exif\0\0MM\0*") + plain[2:],
        "JPEG broken profile": plain[:2]
        + segment(0xE2, b"ICC_PROFILE\0\1\5x")
        + plain[2:],
    }
    kinds = {name: Kind(data, color, 4) for name, data in odd.items()}
    kinds["JPEG grey"] = Kind(encode(grey, "JPEG", quality=95), shown(grey), 2)
    return kinds


def image_kinds() -> dict[str, Kind]:
    """Return all kinds that are decoded, by name."""
    kinds = _pngs() | _plain_files() | _jpegs()
    return {
        name: kind._replace(pixels=kind.pixels.astype(np.uint8))
        for name, kind in kinds.items()
    }


def refused_kinds() -> dict[str, tuple[bytes, str]]:
    """Return the kinds that are refused everywhere, with a part of the reason."""
    color, rows = waves(), [row.tobytes() for row in waves()]
    grey = color[..., 0]
    whole, jpeg = png(rows, color=2), encode(color, "JPEG", quality=95)
    frame = jpeg.index(b"\xff\xc0")
    p6, bmp = encode(color, "PPM"), encode(color, "BMP")
    return {
        "nothing": (b"", "empty file"),
        "HTML": (b"<!DOCTYPE html><html>404</html>", "not an image in a known format"),
        "GIF": (encode(grey, "GIF"), "format GIF is not decoded here"),
        "AVIF": (encode(color, "AVIF"), "format AVIF is not decoded here"),
        "HEIC": (b"\0\0\0\x18ftypheic" + bytes(99), "format HEIC is not decoded here"),
        "JPEG-LS": (
            b"\xff\xd8" + segment(0xF7, bytes(9)) + bytes(99),
            "format JPEG-LS is not decoded here",
        ),
        "ICO": (encode(color, "ICO"), "format ICO is not decoded here"),
        "PAM": (b"P7\nWIDTH 1\n", "format PAM is not decoded here"),
        "float TIFF": (tiff(grey.astype(np.float32), t339=3), "32-bit samples"),
        "32-bit TIFF": (tiff(grey.astype(np.uint32)), "32-bit samples"),
        "PFM": (encode(Image.fromarray(grey.astype(np.float32)), "PPM"), "32-bit"),
        "12-bit JPEG": (
            jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :],
            "12-bit samples",
        ),
        "cut JPEG": (jpeg[:-40], "cut off"),
        "cut PNG": (whole[:-12], "cut off"),
        "PNG of half its rows": (png(rows[:9], color=2), "pixels are cut off"),
        "PNG without a palette": (png(rows, color=3), "palette that is not there"),
        "PNG of a damaged header": (
            whole[:29] + bytes(4) + whole[33:],
            "first chunk is damaged",
        ),
        "cut WebP": (encode(color, "WEBP")[:-40], "cut off"),
        "cut PPM": (p6[:-1], "cut off"),
        "cut TIFF": (tiff(color)[:600], "broken header|not an image"),
        "cut BMP": (bmp[:-99], "does not decode"),
        "a bomb": (
            bmp[:18] + struct.pack("<ii", 30_000, 30_000) + bmp[26:],
            "decompression bomb",
        ),
    }
