"""Turn rows into a worker's images: draw, decode, fill, normalise, erase."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.config import Augment, Data, PixelSettings
from pipelines.hardware.device import is_gpu, upload
from pipelines.transforms.cpu import HostDecoder
from pipelines.transforms.crops import center_crop
from pipelines.transforms.fault_isolation import SafeDecoder, Salvaged
from pipelines.transforms.normalize import Finisher
from pipelines.transforms.pillow_decode import pillow_windows, stored_size
from pipelines.transforms.rows import PIXELS, REASON, BadImage, Rows, nested, rows_of
from pipelines.transforms.sampling import Draws, draw, draw_ids_of

if TYPE_CHECKING:  # an extra, on Linux alone
    from pipelines.transforms.dali import DaliDecoder


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Micro-batch of a fixed shape, its rows beyond the good ones filled."""

    images: Tensor
    """float32 or bfloat16 (num_rows, 3, H, W), channels last."""
    labels: np.ndarray
    weights: np.ndarray
    """float32 (num_rows,): 1 where a row was decoded, else 0."""
    draw_ids: np.ndarray
    """int64 (num_rows,): draw ids of decoded rows, else -1."""
    bad: tuple[BadImage, ...]


def make_decoder(
    settings: PixelSettings, *, batch_size: int, device: torch.device
) -> HostDecoder | DaliDecoder:
    """Build DALI's decoder where it is wanted and installed, else Pillow's.

    Raises ValueError where DALI is asked for by name and is not installed.
    """
    data = settings.data
    # find_spec imports the parent package, which may itself be missing.
    has_nvidia = importlib.util.find_spec("nvidia") is not None
    has_dali = has_nvidia and importlib.util.find_spec("nvidia.dali") is not None
    if data.decoder == "dali" and not has_dali:
        raise ValueError(
            "data.decoder: expected DALI, got a machine without it; install the extra "
            "'train' on Linux or set --data.decoder torch"
        )
    if data.decoder == "torch" or not has_dali:
        windows = functools.partial(pillow_windows, exif=data.exif)
    else:
        from pipelines.transforms.dali import DaliDecoder, DaliWindows

        if is_gpu(device):
            return DaliDecoder(settings, batch_size=batch_size, device=device)
        windows = DaliWindows(
            batch_size=batch_size, num_threads=data.num_decode_threads, exif=data.exif
        )
    return HostDecoder(
        windows,
        img_size=settings.img_size,
        fill=settings.fill,
        num_threads=data.num_decode_threads,
    )


class BatchDecoder:
    """Decoder of rows to normalised images, all batches of one shape.

    Rows that fill the shape, and those whose image is bad, repeat the good ones with
    their labels: real pixels keep BatchNorm's statistics. Their weight is 0.

    Args:
        num_rows: Rows of every batch that comes out.
        dtype: Of the images.
        on_bad: Is told of bad images as they are met, in every epoch again.
    """

    def __init__(
        self,
        settings: PixelSettings,
        *,
        num_rows: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        on_bad: Callable[[tuple[BadImage, ...]], None] = lambda bad: None,
    ) -> None:
        self._settings = settings
        self._num_rows = num_rows
        self._on_bad = on_bad
        # Where the readers decode there is nothing left to decode.
        self._decode: SafeDecoder | None = None
        self.num_ahead = 0
        """Batches worth starting before the first one is asked for."""
        if settings.data.decode_on == "workers":
            decoder = make_decoder(settings, batch_size=num_rows, device=device)
            self._decode = SafeDecoder(decoder.start, exif=settings.data.exif)
            self.num_ahead = decoder.num_ahead
        self._finish = Finisher(
            settings,
            device=device,
            num_threads=settings.data.num_decode_threads,
            dtype=dtype,
        )
        # What a share without a good image shows: the last one, or grey.
        size = settings.img_size
        self._last = torch.tensor(settings.fill, dtype=torch.uint8, device=device)
        self._last = self._last.expand(1, size, size, 3)

    def __call__(self, rows: Rows, epoch: int) -> Decoded:
        """Decode some rows of an epoch."""
        return self.start(rows, epoch)()

    def start(self, rows: Rows, epoch: int) -> Callable[[], Decoded]:
        """Start decoding; return a function that gives the images, in batch order."""
        draws = draw(rows, settings=self._settings, epoch=epoch)
        if self._decode is None:
            size = self._settings.img_size
            return lambda: self._decoded(rows, draws, pixels_of(rows, img_size=size))
        salvaged = self._decode.start(rows, draws)
        return lambda: self._decoded(rows, draws, salvaged())

    def describe(self, rows: Rows, epoch: int) -> list[str]:
        """Name the operations that the images of some rows go through in an epoch."""
        ops = draw(rows, settings=self._settings, epoch=epoch).ops
        return [""] * len(rows) if ops is None else ops.texts()

    def _decoded(self, rows: Rows, draws: Draws, found: Salvaged) -> Decoded:
        bad = tuple(
            BadImage(
                row_id=int(rows.ids[at]),
                key=str(rows.keys[at].as_py()),
                reason=reason,
                repeat=int(rows.repeats[at]),
            )
            for at, reason in found.reasons.items()
        )
        if bad:
            self._on_bad(bad)
        pixels, sources = self._filled(found)
        labels = np.concatenate([rows.labels, [0]])[sources]
        weights = np.zeros(self._num_rows, np.float32)
        weights[found.good] = 1
        draw_ids = np.full(self._num_rows, -1, np.int64)
        draw_ids[found.good] = draw_ids_of(rows)[found.good]
        # Without a good image there is none to erase from.
        has_boxes = draws.boxes is not None and found.good
        boxes = draws.take(sources).boxes if has_boxes else None
        return Decoded(
            images=self._finish(pixels, boxes=boxes),
            labels=labels,
            weights=weights,
            draw_ids=draw_ids,
            bad=bad,
        )

    def _filled(self, found: Salvaged) -> tuple[Tensor, list[int]]:
        """Fill pixels to the whole shape; also return the row each shows, or -1."""
        if found.pixels is None:
            shape = (self._num_rows, -1, -1, -1)
            return self._last.expand(shape), [-1] * self._num_rows
        self._last = found.pixels[:1].clone()
        if len(found.good) == self._num_rows:
            return found.pixels, found.good
        places = np.arange(self._num_rows) % len(found.good)
        # A good row stays at its own place.
        places[found.good] = np.arange(len(found.good))
        pixels = found.pixels[upload(torch.from_numpy(places), found.pixels.device)]
        return pixels, [found.good[place] for place in places]


def pixels_of(rows: Rows, *, img_size: int) -> Salvaged:
    """Extract the pixels that the readers decoded from the rows."""
    assert rows.reasons is not None
    said = rows.reasons.to_pylist()
    good = [at for at in range(len(rows)) if not said[at]]
    shape = (img_size, img_size, 3)
    pixels = [rows.views[at].reshape(shape) for at in good]
    return Salvaged(
        pixels=torch.from_numpy(np.stack(pixels)) if good else None,
        good=good,
        reasons={at: reason for at, reason in enumerate(said) if reason},
    )


class ReaderDecoder:
    """Decoder of share tables: images become pixels, or a reason why there are none.

    For clusters whose GPU machines have few cores: it runs where the shards are read.
    Pixels travel then instead of encoded bytes: 150 kB an image of 224x224 where a JPEG
    of ImageNet is about 110 kB. They are those that the workers' CPUs would make.

    Args:
        batch_size: Rows that one worker has of a batch, at most.
    """

    def __init__(self, settings: PixelSettings, *, batch_size: int) -> None:
        self._settings = settings
        self._batch_size = batch_size
        cpu = torch.device("cpu")
        decoder = make_decoder(settings, batch_size=batch_size, device=cpu)
        self._decode = SafeDecoder(decoder.start, exif=settings.data.exif)

    @property
    def bytes_per_image(self) -> int:
        """Number of bytes of an image's pixels."""
        return 3 * self._settings.img_size**2

    def __call__(self, table: pa.Table) -> pa.Table:
        """Decode one share table."""
        rows, epoch = rows_of(table), table["epoch"][0].as_py()
        size = self.bytes_per_image
        pixels = np.zeros((len(rows), size), np.uint8)
        reasons = [""] * len(rows)
        for start in range(0, len(rows), self._batch_size):
            part = rows.cut(start, start + self._batch_size)
            self._fill(part, epoch, pixels=pixels[start:], reasons=reasons, start=start)
        offsets = np.arange(len(rows) + 1, dtype=np.int64) * size
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(pixels)]
        values = pa.Array.from_buffers(pa.large_binary(), len(rows), buffers)
        table = table.drop_columns("image").append_column(PIXELS, nested(values))
        return table.append_column(REASON, nested(pa.array(reasons, pa.string())))

    def _fill(
        self,
        rows: Rows,
        epoch: int,
        *,
        pixels: np.ndarray,
        reasons: list[str],
        start: int,
    ) -> None:
        draws = draw(rows, settings=self._settings, epoch=epoch)
        found = self._decode(rows, draws)
        if found.pixels is not None:
            pixels[found.good] = found.pixels.flatten(1).numpy()
        for at, reason in found.reasons.items():
            reasons[start + at] = reason


def decode_eval(encoded: Sequence[bytes], *, data: Data, img_size: int) -> Tensor:
    """Decode images as evaluation does, without Ray, DALI or shards.

    They are float32 (B, 3, img_size, img_size), on the CPU.

    Raises BadImageError where one of them is bad.
    """
    settings = PixelSettings(
        data=data, augment=Augment(), img_size=img_size, seed=0, train=False
    )
    exif = data.exif
    sizes = np.array([stored_size(item, exif=exif) for item in encoded])
    geometry = center_crop(
        heights=sizes[:, 0],
        widths=sizes[:, 1],
        img_size=img_size,
        crop_pct=data.crop_pct,
        interpolation=data.eval_interpolation,
    )
    windows = functools.partial(pillow_windows, exif=exif)
    decoder = HostDecoder(windows, img_size=img_size, fill=settings.fill, num_threads=1)
    draws = Draws(geometry=geometry, ops=None, boxes=None)
    views = [np.frombuffer(item, np.uint8) for item in encoded]
    finisher = Finisher(settings, device=torch.device("cpu"), num_threads=1)
    return finisher(decoder(views, draws))
