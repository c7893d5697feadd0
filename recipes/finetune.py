"""Fine-tuning on a folder of your images, and on birds, cars and aircraft.

    sovit-train finetune.folder --data.train ~/photos
    sovit-train finetune.isqrt_resnet50_birds --model.init-from CHECKPOINT

The first fits itself to the images: docs/finetuning.md says how. The others are those
of the papers, from a training on ImageNet-1K.

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

import timm

import sovit
from pipelines.config import (
    Augment,
    Data,
    Facts,
    Model,
    Optim,
    Run,
    Scale,
    Schedule,
)
from recipes import gcp
from recipes._gpus import NUM_DECODE_THREADS, gpus_for
from recipes._sgd import sgd, steps

_CONSTANT = Schedule(kind="constant")
_BATCH_SIZE = 10
# Sides that photographs are not enlarged to, with the stride of a token.
_SIZES = {32: 4, 64: 8, 96: 8, 128: 8, 160: 16, 224: 16}
# A pixel costs a CPU too much for more: there a network of two blocks as well.
_LARGEST_ON_CPUS = 96
_ON_CPUS = {"depth": 2, "embed_dim": 96, "num_heads": 1}
_NUM_STEPS = 1500
_NOTHING_KNOWN = Facts(
    num_images=3000,
    num_classes=2,
    short_side=max(_SIZES),
    num_gpus=0,
    num_cpus=1,
    model="so_vit_7",
    init_from="",
)


def folder(facts: Facts = _NOTHING_KNOWN) -> Run:
    """Fine-tune a small So-ViT on a folder of images, or any other model named."""
    on_cpus = not facts.num_gpus
    most = _LARGEST_ON_CPUS if on_cpus else max(_SIZES)
    fitting = [size for size in _SIZES if size <= min(facts.short_side, most)]
    img_size = max(fitting, default=min(_SIZES))
    batch_size = _batch_size(facts.num_images, most=32 if on_cpus else 128)
    num_epochs = round(_NUM_STEPS * batch_size / facts.num_images)
    return Run(
        recipe="finetune.folder",
        model=_folder_model(facts, img_size=img_size, is_small=on_cpus),
        data=Data(
            train="photos",
            batch_size=batch_size,
            exif="rotate",
            num_decode_threads=min(facts.num_cpus, NUM_DECODE_THREADS),
        ),
        augment=Augment(crop_scale=(0.35, 1.0)),
        optim=Optim(
            lr=5e-4 if facts.init_from else 1e-3,
            num_epochs=min(max(num_epochs, 10), 100),
            warmup_epochs=1,
            classifier_lr_scale=5.0 if facts.init_from else 1.0,
            ema_decay=0.98,
        ),
        # One process needs no Ray, which takes seconds to start.
        scale=Scale(
            num_workers=facts.num_gpus if facts.num_gpus > 1 else 0,
            use_gpu=not on_cpus,
            cpus_per_worker=max(facts.num_cpus // max(facts.num_gpus, 1), 1),
        ),
        log_every_steps=20,
    )


def _batch_size(num_images: int, *, most: int) -> int:
    """Choose a power of two that leaves an epoch ten steps, 4 at least."""
    batch_size = 4
    while 2 * batch_size <= min(num_images / 10, most):
        batch_size *= 2
    return batch_size


def _folder_model(facts: Facts, *, img_size: int, is_small: bool) -> Model:
    name = facts.model
    if not name.startswith("so_vit_"):
        known = timm.get_pretrained_cfg(name)
        is_fixed = known is not None and known.fixed_input_size
        return Model(
            name=name,
            img_size=img_size,
            init_from=facts.init_from,
            kwargs={"img_size": img_size} if is_fixed else {},
        )
    # Weights that are given are of the whole network.
    small = _ON_CPUS if is_small and not facts.init_from else {}
    return Model(
        name=name,
        img_size=img_size,
        init_from=facts.init_from,
        pooling=sovit.default_pooling(name),
        kwargs={"token_stride": _SIZES[img_size], **small},
    )


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
