"""Parse RandAugment's settings as timm writes them: `rand-m9-mstd0.5-inc1`."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

# timm takes a deviation above this as infinite.
_LARGEST_STD = 100.0
_KEYS = (
    "m (magnitude), n (operations an image), mstd (deviation of the magnitude; above "
    "100 it is uniform), mmax (largest magnitude), inc (0 or 1), p (probability)"
)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment's settings (Cubuk et al., 2020), with timm's additions.

    The defaults are timm's, for what a text does not name.
    """

    magnitude: int = 10
    """How strong operations are: the ranges of their arguments are for 0 to 10."""
    num_layers: int = 2
    """Operations drawn for an image, one after another."""
    magnitude_std: float = 0.0
    """Deviation of the magnitude, drawn anew for each; infinite: uniform from 0."""
    magnitude_max: int = 10
    """Magnitudes above are cut."""
    increasing: bool = False
    """Whether every operation changes an image more the larger the magnitude."""
    prob: float = 0.5
    """Probability that a drawn operation is applied."""


def parse_rand_augment(text: str) -> RandAugment:
    """Parse `rand`, then parts of a key and a number, in any order, joined by `-`.

    The meaning is that of `timm.data.auto_augment.rand_augment_transform`, which passes
    over parts without a number and takes the first or the last of two with one key;
    here both are errors. timm's other sets of operations (`t`, once `w`) are left out.

    Raises:
        ValueError: The text is not of this form, or a number is out of range.
    """
    name, *parts = text.split("-")
    if name != "rand":
        raise ValueError(
            f"expected RandAugment as in rand-m9-mstd0.5-inc1, got {text!r}; begin "
            f"with rand, then add any of {_KEYS}"
        )
    found: dict[str, int | float | bool] = {}
    for part in parts:
        field, value = _read_part(part, text=text)
        if field in found:
            raise ValueError(f"expected each key once, got {part!r} again in {text!r}")
        found[field] = value
    return dataclasses.replace(RandAugment(), **found)


def _read_part(part: str, *, text: str) -> tuple[str, int | float | bool]:
    number = part.lstrip("abcdefghijklmnopqrstuvwxyz")
    key = part.removesuffix(number)
    got = f"got {part!r} in {text!r}"
    if key.startswith(("t", "w")):
        raise ValueError(
            f"expected timm's 15 operations, all as likely, {got}; its other sets and "
            "weights are left out; remove this part"
        )
    try:
        match key:
            case "m":
                return "magnitude", _whole(number)
            case "n":
                return "num_layers", _whole(number, at_least=1)
            case "mmax":
                return "magnitude_max", _whole(number, at_least=1)
            case "inc":
                return "increasing", bool(_whole(number))
            case "mstd":
                value = _decimal(number)
                return "magnitude_std", math.inf if value > _LARGEST_STD else value
            case "p":
                return "prob", _decimal(number, at_most=1)
    except _OutOfRange as error:
        raise ValueError(f"expected {key} with {error}, {got}") from None
    raise ValueError(f"expected any of {_KEYS}, {got}")


class _OutOfRange(Exception):
    """Raised when a number is out of range; its text is what was wanted."""


def _whole(number: str, *, at_least: int = 0) -> int:
    if not re.fullmatch("[0-9]+", number) or int(number) < at_least:
        raise _OutOfRange(f"a whole number, at least {at_least}")
    return int(number)


def _decimal(number: str, *, at_most: float = math.inf) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", number) or float(number) > at_most:
        limit = "" if at_most == math.inf else f" to {at_most}"
        raise _OutOfRange(f"a number from 0{limit}")
    return float(number)
