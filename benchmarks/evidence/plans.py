"""The papers' claims as plans, at sizes that a core trains in a minute or two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.evidence.plan import Arm, Images, Plan
from pipelines.config import Schedule
from sovit import Pooling

_CIFAR = Images(name="cifar10", num_train=4000, num_val=2000)
_SMALLER = Images(name="cifar10", num_train=2000, num_val=2000)
_FLOWERS = Images(name="flowers", num_train=1000, num_val=500)
_RATES = (1e-3, 3e-3)

# A So-ViT that is narrower than the demo's, on 8x8 tokens of a photograph.
_SO_VIT: Mapping[str, Any] = {
    "model.kwargs.embed_dim": 64,
    "model.kwargs.depth": 2,
    "optim.num_epochs": 3,
    "data.batch_size": 32,
    "optim.warmup_epochs": 0.5,
}
_SVPN = {"model.kwargs.fusion": "sum"}
_CLASS = {"model.kwargs.fusion": "class"}
_AVG: Mapping[str, Any] = {"model.pooling": Pooling.named("avg")}


def _fused(fusion: str, *, against: str = "class token", **changes: Any) -> Arm:
    """Return a So-ViT whose classifier sees what `fusion` names."""
    changed = {"model.kwargs.fusion": fusion, **changes}
    return Arm(changes=changed, against=against, num_seeds=5)


def _fusions(wider: Mapping[str, Any]) -> dict[str, Arm]:
    """Return the main line of So-ViT: what the classifier sees."""
    averaged = "visual tokens, averaged"
    return {
        "class token": _fused("class", against=""),
        "class token, wider": dataclasses.replace(
            _fused("class", **wider), rate_as="class token"
        ),
        averaged: _fused("visual", **_AVG),
        "visual tokens": _fused("visual", against=averaged),
        "sum": _fused("sum"),
        "concatenation": _fused("concat"),
    }


def _like_sum(**changes: Any) -> Arm:
    """Return a variant of svPN, at the rate of the published one."""
    pooling = {f"pooling.{name}": value for name, value in changes.items()}
    return Arm(changes={**_SVPN, **pooling}, against="sum", rate_as="sum")


_LINEAR = {"model.kwargs.token_embed": "linear"}
SO_VIT = Plan(
    name="so_vit",
    title="So-ViT: the class token and the visual tokens",
    about=(
        "Two blocks of width 64 on 64 tokens. The head is svPN on a cross-covariance "
        "of 48 x 24; what it adds to the mean of the visual tokens is the difference "
        "to those averaged. The wider class token has MLPs of more hidden units, and "
        "the class token's rate. The variants of svPN take the sum's rate."
    ),
    images=_CIFAR,
    changes=_SO_VIT,
    rates=_RATES,
    arms={
        **_fusions({"model.kwargs.mlp_ratio": 3.0}),
        "exponent 0.3": _like_sum(power=0.3),
        "exponent 0.7": _like_sum(power=0.7),
        "exponent 1": _like_sum(power=1.0),
        "3 iterations": _like_sum(num_iterations=3),
        "5 singular values": _like_sum(num_singular_values=5),
        "all singular values": _like_sum(num_singular_values=None),
        "multi-head, 6 of 14 x 14": Arm(
            changes={
                **_SVPN,
                "model.pooling": Pooling.named("multi_head_svpn"),
            },
            against="sum",
            rate_as="sum",
        ),
        "linear embedding, class token": Arm(changes={**_CLASS, **_LINEAR}),
        "linear embedding, sum": Arm(
            changes={**_SVPN, **_LINEAR}, against="linear embedding, class token"
        ),
    },
)
SO_VIT_DEEP = Plan(
    name="so_vit_deep",
    title="So-ViT twice as deep",
    about="As above with four blocks.",
    images=_CIFAR,
    changes={**_SO_VIT, "model.kwargs.depth": 4},
    rates=_RATES,
    arms=_fusions({"model.kwargs.mlp_ratio": 2.5}),
)

# timm's networks, whose stems divide by 4: photographs of 32 pixels are enlarged.
_CONVOLUTIONAL: Mapping[str, Any] = {
    "model.img_size": 64,
    "optim.num_epochs": 3,
    "data.batch_size": 32,
    "optim.warmup_epochs": 0.5,
}
_RESNET: Mapping[str, Any] = {
    **_CONVOLUTIONAL,
    "model.name": "resnet18",
    "model.kwargs": {
        "layers": (1, 1, 1, 1),
        "channels": (16, 32, 64, 128),
        "output_stride": 8,
    },
}
_ISQRT_POOLING = Pooling.named("isqrt_cov", reduced_dim=48)
_ISQRT = {"model.pooling": _ISQRT_POOLING}


def _covariance(name: str, *, act_layer: str = "relu", num_seeds: int = 3) -> Arm:
    """Return a pooling of 48 channels whose reduction ends as the network's layers."""
    pooling = Pooling.named(name, reduced_dim=48, act_layer=act_layer)
    return Arm(
        changes={"model.pooling": pooling}, against="average", num_seeds=num_seeds
    )


POOLING = Plan(
    name="pooling",
    title="Covariance pooling on a small ResNet",
    about=(
        "A ResNet of one basic block a stage, 16 to 128 channels, on photographs "
        "enlarged to 64 pixels; 64 positions are pooled, of 48 channels where it is a "
        "covariance. ECA and GSoP gate channels within the blocks and end in average "
        "pooling."
    ),
    images=_CIFAR,
    changes=_RESNET,
    rates=_RATES,
    arms={
        "average": Arm(changes=_AVG, num_seeds=5),
        "iSQRT-COV": _covariance("isqrt_cov", num_seeds=5),
        "average, wider": Arm(
            changes={**_AVG, "model.kwargs.channels": (16, 32, 64, 134)},
            against="average",
            rate_as="average",
        ),
        "MPN-COV": _covariance("mpn_cov"),
        "Gaussian": _covariance("gaussian"),
        "ECA": Arm(
            changes={"model.name": "eca_resnet18", "model.pooling": None},
            against="average",
        ),
        "GSoP": Arm(
            changes={
                "model.name": "gsop_resnet50_1",
                "model.pooling": None,
                "model.kwargs.backbone": "resnet18",
                "model.kwargs.reduced_dim": 32,
            },
            against="average",
        ),
    },
)
MOBILENET = Plan(
    name="mobilenet",
    title="Covariance pooling on a MobileNetV2",
    about=(
        "MobileNetV2 at a width of 0.35, on photographs enlarged to 64 pixels; 64 "
        "positions are pooled, of 48 channels where it is a covariance. timm's next "
        "larger one has too many parameters to be the wider baseline."
    ),
    images=_SMALLER,
    changes={
        **_CONVOLUTIONAL,
        "model.name": "mobilenetv2_035",
        "model.kwargs": {"output_stride": 8},
    },
    rates=_RATES,
    arms={
        "average": Arm(changes=_AVG),
        "iSQRT-COV": _covariance("isqrt_cov", act_layer="relu6"),
        "MPN-COV": _covariance("mpn_cov", act_layer="relu6"),
        "Gaussian": _covariance("gaussian", act_layer="relu6"),
        "ECA": Arm(
            changes={
                "model.name": "eca_mobilenetv2",
                "model.pooling": None,
                "model.kwargs.backbone": "mobilenetv2_035",
            },
            against="average",
        ),
    },
)


def _scheduled(head: str, name: str) -> Arm:
    """Return a head on one of the optimisation study's schedules, shortened by ten."""
    num_epochs, schedule = {
        "norm": (10, Schedule(kind="step", milestones=(3, 6, 9))),
        "fast": (3, Schedule(kind="polynomial", power=11, end_epoch=5.3)),
        "adjusted": (5, Schedule(kind="polynomial", power=2, end_epoch=5)),
    }[name]
    changes = {
        **(_AVG if head == "average" else _ISQRT),
        "optim.num_epochs": num_epochs,
        "optim.schedule": schedule,
    }
    return Arm(
        changes=changes,
        against="" if head == "average" else f"average, {name}",
        rate_as="" if name == "norm" else f"{head}, norm",
    )


SCHEDULES = Plan(
    name="schedules",
    title="The optimisation study: schedules and the smoothness of the loss",
    about=(
        "The small ResNet by SGD on the study's three schedules, a tenth as long, "
        "so that their budgets differ as there: 10 epochs, 3 and 5. The rate is chosen "
        "on the normal one. Every 40 steps the loss is probed at 10 points along its "
        "gradient."
    ),
    images=_SMALLER,
    changes={
        **_RESNET,
        "optim.optimizer": "sgd",
        "optim.weight_decay": 1e-4,
        "optim.warmup_epochs": 0,
        "optim.label_smoothing": 0.0,
        "probe.every_steps": 40,
        "probe.num_step_sizes": 10,
        "validation.every_epochs": 1,
    },
    rates=(0.03, 0.1),
    arms={
        f"{head}, {name}": _scheduled(head, name)
        for name in ("norm", "fast", "adjusted")
        for head in ("average", "iSQRT-COV")
    },
    curves=(
        "val/top1",
        "probe/loss_min",
        "probe/loss_max",
        "probe/gradient_change_min",
        "probe/gradient_change_max",
    ),
)
ROBUSTNESS = Plan(
    name="robustness",
    title="Corrupted photographs",
    about=(
        "The small ResNet of above, evaluated under the 15 corruptions at five "
        "severities each: mCE is the mean over the corruptions of the error in percent "
        "of average pooling's with the same seed."
    ),
    images=_CIFAR,
    changes=_RESNET,
    rates=(1e-3,),
    arms={
        "average": Arm(changes=_AVG),
        "iSQRT-COV": Arm(changes=_ISQRT, against="average"),
    },
    num_corrupted=300,
)
_TUNED = ("so_vit", "class token"), ("so_vit", "sum")
FLOWERS = Plan(
    name="flowers",
    title="Flowers, from scratch and fine-tuned",
    about=(
        "Photographs of flowers at 160 pixels, 100 tokens of 16 pixels a side, by the "
        "So-ViT of above; fine-tuned ones start from its training on CIFAR-10."
    ),
    images=_FLOWERS,
    changes={**_SO_VIT, "model.img_size": 160, "model.kwargs.token_stride": 16},
    rates=_RATES,
    arms={
        "class token": Arm(changes=_CLASS),
        "sum": Arm(changes=_SVPN, against="class token"),
        "class token, fine-tuned": Arm(changes=_CLASS, init_from=_TUNED[0]),
        "sum, fine-tuned": Arm(
            changes=_SVPN, against="class token, fine-tuned", init_from=_TUNED[1]
        ),
    },
)
TOKENS = Plan(
    name="tokens",
    title="The gain against the number of tokens",
    about="The So-ViT of above with one token for 16x16, 8x8 or 4x4 pixels.",
    images=_CIFAR,
    changes=_SO_VIT,
    rates=(1e-3,),
    arms={
        f"{(32 // stride) ** 2} tokens, {head}": Arm(
            changes={**fusion, "model.kwargs.token_stride": stride},
            against=""
            if head == "class token"
            else f"{(32 // stride) ** 2} tokens, class token",
        )
        for stride in (16, 8, 4)
        for head, fusion in (("class token", _CLASS), ("sum", _SVPN))
    },
)


def _pooled(dims: tuple[int, int], **changes: Any) -> Arm:
    """Return a setting of the head, for ranks."""
    fields = {"reduced_dim": dims, **changes}
    changed = {f"pooling.{name}": value for name, value in fields.items()}
    return Arm(changes={**_SVPN, **changed}, num_seeds=1)


HEADS = Plan(
    name="heads",
    title="Heads on tokens, and full training",
    about=(
        "Settings of svPN's head, each trained in full by the So-ViT of above, and its "
        "head alone for 10 epochs on the tokens of a trained one, whose head has 48 x "
        "24. The question is whether the cheap ranking is that of full training."
    ),
    images=_CIFAR,
    changes=_SO_VIT,
    rates=(1e-3,),
    arms={
        **{
            f"{dims[0]} x {dims[1]}, exponent {power:g}": _pooled(dims, power=power)
            for dims in ((4, 2), (12, 6), (24, 12), (48, 24))
            for power in (0.3, 0.5, 1.0)
        },
        "48 x 24, not normalised": _pooled((48, 24), normalizer="none"),
        "48 x 24, signed root": _pooled((48, 24), normalizer="signed_sqrt"),
        "48 x 24, LayerNorm": _pooled((48, 24), normalizer="layer_norm"),
        "64 x 48, exponent 0.5": _pooled((64, 48)),
    },
    tokens_of=("so_vit", "sum"),
)


def _root(**changes: Any) -> Arm:
    """Return a way to the square root, at the rate of the papers' own."""
    changed = {"model.pooling": dataclasses.replace(_ISQRT_POOLING, **changes)}
    against = "Newton-Schulz, 5 steps" if changes else ""
    return Arm(changes=changed, against=against, rate_as=against, num_seeds=5)


def _roots(images: Images, **changes: Any) -> Plan:
    """Compare roots of one covariance, by photographs of a set."""
    return Plan(
        name=f"roots_{images.name}",
        title=f"How true the root is: {images.name}",
        about=(
            "The small ResNet of above with iSQRT-COV, whose root alone differs. At "
            "equal cost: minimax steps, as many as the papers'; at equal error: three "
            "of them. The exact root is MPN-COV's, by eigenvalues; MPA's is a rational "
            "function, as in sovit.approximants."
        ),
        images=images,
        changes={**_RESNET, **changes},
        rates=_RATES,
        arms={
            "Newton-Schulz, 5 steps": _root(),
            "Newton-Schulz, 3 steps": _root(num_iterations=3),
            "minimax, 5 steps": _root(coefficients="minimax"),
            "minimax, 3 steps": _root(coefficients="minimax", num_iterations=3),
            "MPA": _root(normalizer="mpa", num_iterations=1),
            "exact": _root(normalizer="eigen", num_iterations=1),
        },
    )


ROOTS = _roots(_CIFAR)
ROOTS_FLOWERS = _roots(_FLOWERS, **{"model.img_size": 128, "optim.num_epochs": 6})
PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        plan.name: plan
        for plan in (
            SO_VIT,
            SO_VIT_DEEP,
            POOLING,
            MOBILENET,
            SCHEDULES,
            ROBUSTNESS,
            TOKENS,
            HEADS,
            FLOWERS,
            ROOTS,
            ROOTS_FLOWERS,
        )
    }
)
