"""Common settings of the papers' PyTorch scripts: SGD on random crops and flips.

Momentum 0.9, all parameters decayed (BatchNorm's and biases too), no warm-up, plain
cross-entropy. Training cuts random-resized crops and flips half of them; evaluation
resizes the short side to 256 and crops 224. Here as there bilinearly, but antialiased
by our decoders' rules; and in bfloat16 where a GPU has it, unless --scale.amp off.
"""

from __future__ import annotations

from pipelines.config import (
    Augment,
    Data,
    Model,
    Optim,
    Probe,
    Run,
    Schedule,
)
from recipes._gpus import NUM_DECODE_THREADS, gpus_for

NO_PROBE = Probe()


def steps(*milestones: float) -> Schedule:
    """Return the schedule that divides the rate by ten at these epochs."""
    return Schedule(kind="step", milestones=milestones)


def sgd(
    lr: float,
    *,
    num_epochs: int,
    schedule: Schedule,
    weight_decay: float = 1e-4,
    classifier_lr_scale: float = 1.0,
) -> Optim:
    """Return the scripts' SGD settings."""
    return Optim(
        optimizer="sgd",
        lr=lr,
        momentum=0.9,
        num_epochs=num_epochs,
        schedule=schedule,
        warmup_epochs=0,
        weight_decay=weight_decay,
        decay_all=True,
        classifier_lr_scale=classifier_lr_scale,
        label_smoothing=0.0,
    )


def imagenet(
    recipe: str,
    *,
    model: Model,
    optim: Optim,
    batch_size: int,
    published_top1: float | None = None,
    probe: Probe = NO_PROBE,
) -> Run:
    """Return the run of a training on ImageNet-1K as the scripts do it."""
    return Run(
        recipe=recipe,
        model=model,
        data=Data(
            train="shards/imagenet/train",
            val="shards/imagenet/val",
            batch_size=batch_size,
            eval_batch_size=512,
            eval_interpolation="bilinear",
            num_decode_threads=NUM_DECODE_THREADS,
            num_readers=16,
        ),
        augment=Augment(interpolation="bilinear"),
        optim=optim,
        scale=gpus_for(batch_size),
        probe=probe,
        published_top1=published_top1,
    )
