"""Turn rows into a worker's images: draw, decode, fill, normalise, erase."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipelines.hardware.device import is_gpu, upload
from pipelines.transforms.cpu import HostDecoder
from pipelines.transforms.fault_isolation import PixelDecoder, SafeDecoder, Salvaged
from pipelines.transforms.normalize import Finisher
from pipelines.transforms.pillow_decode import PillowWindows
from pipelines.transforms.rows import BadImage, Rows
from pipelines.transforms.sampling import Draws, PixelSettings, draw, draw_ids_of


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
) -> PixelDecoder:
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
        windows = PillowWindows(exif=data.exif)
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
        self._decode = (
            SafeDecoder(
                make_decoder(settings, batch_size=num_rows, device=device),
                exif=settings.data.exif,
            )
            if settings.data.decode_on == "workers"
            else None
        )
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

    @property
    def num_ahead(self) -> int:
        """Batches worth starting before the first one is asked for."""
        return self._decode.num_ahead if self._decode is not None else 0

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
        if not found.good:
            draws = replace(draws, boxes=None)
        elif draws.boxes is not None:
            draws = draws.take(sources)
        return Decoded(
            images=self._finish(pixels, draws),
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
