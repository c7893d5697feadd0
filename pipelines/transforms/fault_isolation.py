"""Decode whatever is decodable of a batch: a bad image costs that image alone.

Bytes are screened first: most damage shows without decoding, and a JPEG that was cut
off passes a decoder where the crop misses the hole. Where one still refuses a batch,
DALI often does not say for which image, so each is tried alone and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipelines.config import Exif
from pipelines.transforms.headers import BadImageError, read_header
from pipelines.transforms.pillow_decode import as_ppm, decode_image, is_whole
from pipelines.transforms.rows import Rows
from pipelines.transforms.sampling import Draws

StartDecode = Callable[[Sequence[np.ndarray], Draws], Callable[[], Tensor]]
"""Starts decoding encoded images to uint8 pixels (n, H, W, 3); returns a function that
waits for them, or raises. Each batch gives its own pixels, or its own error, whatever
becomes of the others."""


@dataclass(frozen=True, kw_only=True)
class Salvaged:
    """Pixels of the rows that could be decoded, and why others could not."""

    pixels: Tensor | None
    """uint8 (len(good), H, W, 3); None where no image is good."""
    good: list[int]
    """Places of the rows that were decoded."""
    reasons: dict[int, str]
    """Reason why the row at a place was not decoded."""


class SafeDecoder:
    """Decoder that isolates bad images where another refuses a whole batch for one.

    What it refuses is bad only where the judge, `decode_image`, refuses it too: else it
    is given the judge's pixels.
    """

    def __init__(self, start: StartDecode, *, exif: Exif = "ignore") -> None:
        self._start_decode = start
        self._exif: Exif = exif
        # An image that failed once is not tried again.
        self._known: dict[int, str] = {}
        self._judged: set[int] = set()

    def __call__(self, rows: Rows, draws: Draws) -> Salvaged:
        """Decode; raises only errors that no image causes: memory, a driver."""
        return self.start(rows, draws)()

    def start(self, rows: Rows, draws: Draws) -> Callable[[], Salvaged]:
        """Start decoding; return a function that waits for the result of `__call__`."""
        reasons: dict[int, str] = {}
        for at, view in enumerate(rows.views):
            size = {"height": int(rows.heights[at]), "width": int(rows.widths[at])}
            reason = self._known.get(int(rows.ids[at]), "") or screen(view, **size)
            if reason:
                reasons[at] = reason
        good = [at for at in range(len(rows)) if at not in reasons]
        # A batch before this one may yet find out what this one was given as it is.
        num_judged = len(self._judged)
        decoded = self._start(rows, draws, good)

        def salvage() -> Salvaged:
            try:
                pixels = decoded()
            except Exception as error:
                return self._mended(
                    rows, draws, good, reasons, num_judged=num_judged, error=error
                )
            return Salvaged(pixels=pixels, good=good, reasons=reasons)

        return salvage

    def _mended(
        self,
        rows: Rows,
        draws: Draws,
        good: list[int],
        reasons: dict[int, str],
        *,
        num_judged: int,
        error: Exception,
    ) -> Salvaged:
        """Decode without the bad images; raises the error where none is to blame."""
        found = self._find(rows, draws, good)
        blames_all = len(found) == len(good) > 1
        is_mended = bool(found) or len(self._judged) > num_judged
        if not is_mended or (blames_all and any(is_whole(v) for v in rows.views)):
            raise error  # the images are whole
        self._known |= {int(rows.ids[at]): why for at, why in found.items()}
        reasons |= found
        good = [at for at in good if at not in found]
        try:
            pixels = self._start(rows, draws, good)()
        except Exception:
            raise error from None
        return Salvaged(pixels=pixels, good=good, reasons=reasons)

    def _start(
        self, rows: Rows, draws: Draws, places: list[int]
    ) -> Callable[[], Tensor | None]:
        if not places:
            return lambda: None
        views = [rows.views[at] for at in places]
        for place, at in enumerate(places if self._judged else ()):
            if int(rows.ids[at]) in self._judged:
                pixels = decode_image(views[place].tobytes(), exif=self._exif)
                views[place] = as_ppm(pixels)
        if len(places) == len(rows):
            return self._start_decode(views, draws)
        return self._start_decode(views, draws.take(places))

    def _find(self, rows: Rows, draws: Draws, places: list[int]) -> dict[int, str]:
        """Try each image alone; return why the bad ones can't be decoded."""
        found = {}
        for at in places:
            try:
                self._start(rows, draws, [at])()
            except Exception as error:  # each decoder has its own
                reason = self._judge(rows, draws, at, error=error)
                if reason:
                    found[at] = reason
        return found

    def _judge(self, rows: Rows, draws: Draws, at: int, *, error: Exception) -> str:
        """Return why an image that the decoder refuses is bad; "" where it is whole."""
        try:
            decode_image(rows.views[at].tobytes(), exif=self._exif)
        except BadImageError as bad:
            return str(bad)
        self._judged.add(int(rows.ids[at]))
        try:
            self._start(rows, draws, [at])()
        except Exception:
            self._judged.discard(int(rows.ids[at]))
            return _reason(error)
        return ""


def _reason(error: Exception) -> str:
    """Extract the line of a decoder's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "fail" in line.lower()]
    said = (telling or lines or [type(error).__name__])[-1]
    return f"the decoder refuses it: {said[:120]}"


def screen(encoded: np.ndarray, *, height: int, width: int) -> str:
    """Return why an image can't be decoded, or "" where its bytes look whole.

    Args:
        encoded: uint8 view of the file's bytes.
        height: Stored pixels, as the shard has them; width likewise.
    """
    try:
        header = read_header(encoded.data)
    except BadImageError as error:
        return str(error)
    if (header.height, header.width) == (height, width):
        return ""
    return (
        f"{header.format} of {header.width}x{header.height} pixels, the shard says "
        f"{width}x{height}"
    )
