"""Facts that a recipe may fit itself to: the images, this machine, the named model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of a folder of images and of where it is trained on.

    A recipe that has a parameter `facts` gets them where --data.train is such a folder;
    what it makes of them, flags override as ever.
    """

    num_images: int
    """Of the training set, what is held out left out."""
    num_classes: int
    short_side: int
    """Median of the images' shorter sides in pixels."""
    num_gpus: int
    """Of this machine."""
    num_cpus: int
    model: str
    """The model's name, which --model.name may have set."""
    init_from: str
    """The weights that --model.init-from names; "" for random ones."""
