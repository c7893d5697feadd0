"""Fine-tuning on birds, cars and aircraft, from a training on ImageNet-1K.

    sovit-train finetune.isqrt_resnet50_birds --model.init-from CHECKPOINT

CHECKPOINT is what `sovit-train gcp.isqrt_resnet50` printed at its end, or what else
docs/finetuning.md lists. Hardware: one GPU with bfloat16 and 8 GB or more, by the
estimate of --dry-run. Hours: not published, and not measured by us yet. Of So-ViT and
SoT no fine-tuning on images was found published; that page has the command.

Top-1 in percent on CUB-200-2011, Stanford Cars and FGVC Aircraft, as published:

| recipe            | birds | cars | aircraft | source                                 |
| ----------------- | ----- | ---- | -------- | -------------------------------------- |
| mpncov_resnet50_  |  87.6 | 92.9 |     90.5 | README of the released MPN-COV code    |
| isqrt_resnet50_   |  88.0 | 92.3 |     90.3 | READMEs of fast-MPN-COV, fine-tuned    |
| isqrt_vgg16_      |  87.0 | 93.2 |     91.7 | with PyTorch                           |
| isqrt_resnet101_  |  88.1 | 93.9 |     91.8 | README of the authors' TensorFlow code |

The paper of iSQRT-COV has 88.1, 92.8 and 90.0 for ResNet-50 by another way: an SVM on
the features. Its code reports the best epoch, we the last one.

As in that code: a constant rate, of the fresh classifier 5 times that, of VGG-16's 20
times; the middle of the image at 448 pixels with random flips; and the mean of the
logits of the crop and its mirror image in evaluation. Its training squeezes images of
cars and aircraft into a square; here they keep their shape. The settings of ResNet-101
in TensorFlow and MPN-COV's batch size were not found: those of ResNet-50 are taken.
"""

from __future__ import annotations

import dataclasses

from pipelines.config import Augment, Data, Optim, Run, Schedule
from recipes import gcp
from recipes._gpus import NUM_DECODE_THREADS, gpus_for
from recipes._sgd import sgd, steps

_CONSTANT = Schedule(kind="constant")
_BATCH_SIZE = 10


def mpncov_resnet50_birds() -> Run:
    """Fine-tune MPN-COV of ResNet-50 on birds."""
    return _mpncov("birds", num_epochs=100, published_top1=87.6)


def mpncov_resnet50_cars() -> Run:
    """Fine-tune MPN-COV of ResNet-50 on cars."""
    return _mpncov("cars", num_epochs=150, published_top1=92.9)


def mpncov_resnet50_aircraft() -> Run:
    """Fine-tune MPN-COV of ResNet-50 on aircraft."""
    return _mpncov("aircraft", num_epochs=100, img_size=512, published_top1=90.5)


def isqrt_resnet50_birds() -> Run:
    """Fine-tune iSQRT-COV of ResNet-50 on birds."""
    return _isqrt(50, "birds", published_top1=88.0)


def isqrt_resnet50_cars() -> Run:
    """Fine-tune iSQRT-COV of ResNet-50 on cars."""
    return _isqrt(50, "cars", published_top1=92.3)


def isqrt_resnet50_aircraft() -> Run:
    """Fine-tune iSQRT-COV of ResNet-50 on aircraft."""
    return _isqrt(50, "aircraft", published_top1=90.3)


def isqrt_resnet101_birds() -> Run:
    """Fine-tune iSQRT-COV of ResNet-101 on birds."""
    return _isqrt(101, "birds", published_top1=88.1)


def isqrt_resnet101_cars() -> Run:
    """Fine-tune iSQRT-COV of ResNet-101 on cars."""
    return _isqrt(101, "cars", published_top1=93.9)


def isqrt_resnet101_aircraft() -> Run:
    """Fine-tune iSQRT-COV of ResNet-101 on aircraft."""
    return _isqrt(101, "aircraft", published_top1=91.8)


def isqrt_vgg16_birds() -> Run:
    """Fine-tune iSQRT-COV of VGG-16 on birds."""
    return _vgg("birds", published_top1=87.0)


def isqrt_vgg16_cars() -> Run:
    """Fine-tune iSQRT-COV of VGG-16 on cars."""
    return _vgg("cars", published_top1=93.2)


def isqrt_vgg16_aircraft() -> Run:
    """Fine-tune iSQRT-COV of VGG-16 on aircraft."""
    return _vgg("aircraft", published_top1=91.7)


def _mpncov(
    images: str, *, num_epochs: int, published_top1: float, img_size: int = 448
) -> Run:
    return _tuned(
        gcp.mpncov_resnet50(),
        images,
        # 0.1 x 10^-1.5.
        optim=sgd(
            3.16e-3,
            num_epochs=num_epochs,
            schedule=_CONSTANT,
            classifier_lr_scale=5.0,
        ),
        img_size=img_size,
        published_top1=published_top1,
    )


def _isqrt(depth: int, images: str, *, published_top1: float) -> Run:
    start = {50: gcp.isqrt_resnet50, 101: gcp.isqrt_resnet101}[depth]
    return _tuned(
        start(),
        images,
        optim=sgd(1.2e-3, num_epochs=100, schedule=_CONSTANT, classifier_lr_scale=5.0),
        published_top1=published_top1,
    )


def _vgg(images: str, *, published_top1: float) -> Run:
    return _tuned(
        gcp.isqrt_vgg16(),
        images,
        optim=sgd(3e-3, num_epochs=40, schedule=steps(20), classifier_lr_scale=20.0),
        published_top1=published_top1,
    )


def _tuned(
    start: Run, images: str, *, optim: Optim, published_top1: float, img_size: int = 448
) -> Run:
    name = start.model.name
    return Run(
        recipe=f"finetune.{name}_{images}",
        model=dataclasses.replace(
            start.model, img_size=img_size, init_from=f"checkpoints/{name}"
        ),
        data=Data(
            train=f"shards/{images}/train",
            val=f"shards/{images}/val",
            batch_size=_BATCH_SIZE,
            eval_batch_size=64,
            eval_interpolation="bilinear",
            eval_mirror=True,
            crop_pct=1.0,
            num_decode_threads=NUM_DECODE_THREADS,
        ),
        # The largest square in the middle, always.
        augment=Augment(
            crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), interpolation="bilinear"
        ),
        optim=optim,
        scale=gpus_for(_BATCH_SIZE),
        published_top1=published_top1,
    )
