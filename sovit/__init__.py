"""Second-order vision models in PyTorch: So-ViT, SoT and their family.

Importing this package puts the models into timm's registry:
`timm.create_model("so_vit_7")`. It needs torch and timm, and nothing else.
"""

from __future__ import annotations

from sovit.head import SecondOrderHead
from sovit.moments import covariance, cross_covariance
from sovit.official import load_official
from sovit.pooling import Pooling
from sovit.powers import sv_power
from sovit.svpn import svpn
from sovit.variants import default_pooling
from sovit.vit import SoViT

__all__ = [
    "Pooling",
    "SecondOrderHead",
    "SoViT",
    "covariance",
    "cross_covariance",
    "default_pooling",
    "load_official",
    "sv_power",
    "svpn",
]
