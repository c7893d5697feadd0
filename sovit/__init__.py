"""Second-order vision models in PyTorch: So-ViT, SoT and their family.

Importing this package puts the models into timm's registry:
`timm.create_model("so_vit_7")`. It needs torch and timm, and nothing else.
`second_order` puts a second-order head on any other model of timm.
"""

from __future__ import annotations

from sovit.architectures.backbones import SecondOrderNet, second_order
from sovit.architectures.vit import SoViT
from sovit.attention import Gsop
from sovit.head import SecondOrderHead
from sovit.minimax import minimax_coefficients
from sovit.moments import (
    covariance,
    cross_covariance,
    gaussian_embedding,
    upper_triangle,
)
from sovit.networks.so_vit import default_pooling
from sovit.newton_schulz import (
    covariance_sqrt,
    newton_schulz_inverse_sqrt,
    newton_schulz_sqrt,
)
from sovit.pooling import FewTokensWarning, Pooling, build_pooling
from sovit.powers import covariance_power, matrix_log, matrix_power, sv_power
from sovit.probes import Probed, find_stem, probe
from sovit.svpn import svpn
from sovit.weights.official import load_official

__all__ = [
    "FewTokensWarning",
    "Gsop",
    "Pooling",
    "Probed",
    "SecondOrderHead",
    "SecondOrderNet",
    "SoViT",
    "build_pooling",
    "covariance",
    "covariance_power",
    "covariance_sqrt",
    "cross_covariance",
    "default_pooling",
    "find_stem",
    "gaussian_embedding",
    "load_official",
    "matrix_log",
    "matrix_power",
    "minimax_coefficients",
    "newton_schulz_inverse_sqrt",
    "newton_schulz_sqrt",
    "probe",
    "second_order",
    "sv_power",
    "svpn",
    "upper_triangle",
]
