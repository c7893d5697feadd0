"""DeiT and Swin with SoT's embedding and head, on ImageNet-1K.

    sovit-train deit_swin.deit_tiny_so --data.train SHARDS/train --data.val SHARDS/val

Hardware: 4 GPUs, 8 for DeiT-Ti and Swin-T, with bfloat16 and 40 GB (A100, H100, H200),
128 images each; the estimate of --dry-run, not measured, is up to 32 GB (Swin-B).
Hours: not published, and not measured by us yet; 310 epochs train on 397 million
images.

Top-1 in percent, one 224x224 crop of the held-out set, as published:

| recipe       | params M | top-1 | source                                             |
| ------------ | -------- | ----- | -------------------------------------------------- |
| deit_tiny_so |     7.05 |  78.6 | README of the released SoT code, December 2021,    |
| deit_base_so |    94.88 |  82.9 | which has 7.0, 94.9, 31.6 and 95.9 M parameters    |
| swin_tiny_so |    31.45 |  83.0 |                                                    |
| swin_base_so |    95.67 |  84.0 |                                                    |

How they were trained is not published. These are the settings of the SoT of about that
size; the figures are what other settings gave.
"""

from __future__ import annotations

import dataclasses

import sovit
from pipelines.config import Model, Run
from recipes import imagenet


def deit_tiny_so() -> Run:
    """Train DeiT-Ti with SoT's head as SoT-Tiny is trained."""
    run = imagenet.sot_tiny()
    return _like(run, name="deit_tiny_so", reduced_dim=14, published_top1=78.6)


def deit_base_so() -> Run:
    """Train DeiT-B with SoT's head as SoT-Base is trained."""
    run = imagenet.sot_base()
    return _like(run, name="deit_base_so", reduced_dim=37, published_top1=82.9)


def swin_tiny_so() -> Run:
    """Train Swin-T with SoT's head as SoT-Small is trained."""
    run = imagenet.sot_small()
    return _like(run, name="swin_tiny_so", reduced_dim=24, published_top1=83.0)


def swin_base_so() -> Run:
    """Train Swin-B with SoT's head as SoT-Base is trained."""
    run = imagenet.sot_base()
    return _like(run, name="swin_base_so", reduced_dim=37, published_top1=84.0)


def _like(run: Run, *, name: str, reduced_dim: int, published_top1: float) -> Run:
    pooling = sovit.default_pooling("sot_tiny").changed({"reduced_dim": reduced_dim})
    return dataclasses.replace(
        run,
        recipe=f"deit_swin.{name}",
        model=Model(
            name=name,
            drop_path_rate=run.model.drop_path_rate,
            pooling=pooling,
        ),
        published_top1=published_top1,
    )
