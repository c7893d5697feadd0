"""The CPU twin of the big run: a small So-ViT on 12,000 photographs of clothes.

    make demo        (or: sovit-train demo)

Fashion-MNIST, a balanced part of it that lies beside this file. Two workers, through
Ray Data, DALI and Ray Train, as on a cluster. A token is 4x4 pixels, so that there are
64 for a covariance of 48 x 24; at the published 16x16 pixels there would be four.
"""

from __future__ import annotations

from pathlib import Path

import sovit
from pipelines.config import Augment, Data, Model, Optim, Run, Scale

_IMAGES = Path(__file__).parent / "fashion_mnist"


def demo() -> Run:
    """Train a So-ViT of two blocks on 32x32 pixels for a few minutes on two cores."""
    return Run(
        recipe="demo",
        model=Model(
            name="so_vit_7",
            img_size=32,
            pooling=sovit.default_pooling("so_vit_7"),
            kwargs={"token_stride": 4, "depth": 2, "embed_dim": 96, "num_heads": 1},
        ),
        data=Data(
            train=str(_IMAGES / "train"),
            val=str(_IMAGES / "val"),
            batch_size=64,
            crop_pct=1.0,
            num_readers=1,
        ),
        augment=Augment(crop_scale=(0.8, 1.0), interpolation="bilinear"),
        optim=Optim(
            lr=2e-3,
            num_epochs=8,
            warmup_epochs=1,
            weight_decay=0.05,
            label_smoothing=0.1,
            ema_decay=0.98,
        ),
        scale=Scale(num_workers=2),
        log_every_steps=20,
    )
