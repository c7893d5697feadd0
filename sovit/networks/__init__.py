"""Networks by name: importing this package puts them into timm's registry."""

from __future__ import annotations

from sovit.networks import any_backbone, deit_swin, eca_gsop, gcp, so_vit  # noqa: F401
