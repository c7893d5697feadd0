"""Choose and build a worker's decoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.config import Data
from pipelines.ingest.feed import Decoder, Rows, geometry_of
from pipelines.ingest.torch_decode import TorchDecoder, find_damaged


def make_decoder(
    data: Data, *, img_size: int, batch_size: int, train: bool, device: torch.device
) -> Decoder:
    """Build DALI's decoder where it is wanted and installed, else the torch one.

    Raises ValueError where DALI is asked for by name and is not installed.
    """
    interpolation = data.train_interpolation if train else data.eval_interpolation
    # find_spec imports the parent package, which may itself be missing.
    has_nvidia = importlib.util.find_spec("nvidia") is not None
    has_dali = has_nvidia and importlib.util.find_spec("nvidia.dali") is not None
    if data.decoder == "dali" and not has_dali:
        raise ValueError(
            "data.decoder: wanted DALI, came a machine without it; install the extra "
            "'train' on Linux or set --data.decoder torch"
        )
    if data.decoder == "torch" or not has_dali:
        return TorchDecoder(
            img_size=img_size,
            mean=data.mean,
            std=data.std,
            interpolation=interpolation,
            device=device,
        )
    from pipelines.ingest.dali import DaliDecoder

    return DaliDecoder(
        batch_size=batch_size,
        img_size=img_size,
        mean=data.mean,
        std=data.std,
        interpolation=interpolation,
        device=device,
        num_threads=data.num_decode_threads,
    )


def decode_rows(
    decoder: Decoder, *, data: Data, img_size: int, seed: int, train: bool
) -> Callable[[Rows, int], Tensor]:
    """Bind a decoder to its windows: rows of an epoch go in, images come out.

    The result raises ValueError, naming the image, where one can't be decoded.
    """

    def decode(rows: Rows, epoch: int) -> Tensor:
        geometry = geometry_of(
            rows, data=data, img_size=img_size, seed=seed, epoch=epoch, train=train
        )
        try:
            return decoder(rows.views, geometry)
        except Exception as error:
            found = find_damaged(rows.views)
            if found is None:  # the images are whole: memory, a driver
                raise
            raise ValueError(
                f"wanted an image that can be decoded, came {rows.keys[found]}, row "
                f"{rows.ids[found]} of the set; write the shards again with "
                "sovit-shards, which leaves such images out"
            ) from error

    return decode
