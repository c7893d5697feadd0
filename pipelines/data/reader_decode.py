"""Decode where the shards are read, for clusters whose GPU machines have few cores.

Pixels travel then instead of encoded bytes: 150 kB an image of 224x224 where a JPEG of
ImageNet is about 110 kB. They are those that the workers' CPUs would make.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from pipelines.transforms.decoder import make_decoder
from pipelines.transforms.fault_isolation import SafeDecoder
from pipelines.transforms.rows import PIXELS, REASON, Rows, nested, rows_of
from pipelines.transforms.sampling import PixelSettings, draw


class ReaderDecoder:
    """Decoder of share tables: images become pixels, or a reason why there are none.

    Args:
        batch_size: Rows that one worker has of a batch, at most.
    """

    def __init__(self, settings: PixelSettings, *, batch_size: int) -> None:
        self._settings = settings
        self._batch_size = batch_size
        self._decode = SafeDecoder(
            make_decoder(settings, batch_size=batch_size, device=torch.device("cpu")),
            exif=settings.data.exif,
        )

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
