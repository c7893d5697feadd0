"""Map ImageNet's classes, which are WordNet ids, to readable names."""

from __future__ import annotations

from collections.abc import Sequence

from timm.data.imagenet_info import ImageNetInfo


def readable_names(classes: Sequence[str]) -> dict[str, str]:
    """Map classes, such as n02123045, to names; empty if timm lacks one of them."""
    info = ImageNetInfo()  # its names are those of all of ImageNet
    try:
        return {label: info.label_name_to_description(label) for label in classes}
    except KeyError:
        return {}
