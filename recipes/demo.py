"""The CPU twin of the big run: a small So-ViT on 12,000 photographs of clothes.

    make demo        (or: sovit-train demo)

Fashion-MNIST, a balanced part of it that lies beside this file. Two workers, through
Ray Data, DALI and Ray Train, as on a cluster.
"""

from __future__ import annotations

from pathlib import Path

import sovit
from pipelines.config import Augment, Data, Model, Optim, Run, Scale

_IMAGES = Path(__file__).parent / "fashion_mnist"


def demo() -> Run:
    """Train a So-ViT of four blocks on 32x32 pixels for a few minutes on two cores."""
    return Run(
        recipe="demo",
        model=Model(
            name="so_vit_7",
            img_size=32,
            pooling=sovit.default_pooling("so_vit_7"),
            kwargs={"depth": 4, "embed_dim": 128, "num_heads": 2},
        ),
        data=Data(
            train=str(_IMAGES / "train"),
            val=str(_IMAGES / "val"),
            batch_size=128,
            crop_pct=1.0,
            num_readers=1,
        ),
        augment=Augment(crop_scale=(0.6, 1.0), interpolation="bilinear"),
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
