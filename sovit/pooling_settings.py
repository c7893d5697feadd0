"""Settings of every pooling: how visual tokens become one vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, no_type_check

from sovit.approximants import APPROXIMANTS
from sovit.minimax import COEFFICIENTS, find_coefficients
from sovit.moments import CENTERINGS
from sovit.newton_schulz import PRE_NORMS
from sovit.shapes import Number

PoolingType = Literal["cross_cov", "multi_head", "cov", "gaussian", "moment", "avg"]
Normalizer = Literal[
    "svpn",
    "newton_schulz",
    "mpa",
    "mtp",
    "eigen",
    "log",
    "svd",
    "signed_sqrt",
    "layer_norm",
    "scale",
    "learned_scale",
    "none",
]
Start = Literal["learned", "ones"]
SYMMETRIC_TYPES = ("cov", "gaussian")
# Two convolutions of 3x3 and stride 2 need as many rows.
_LEAST_MOMENT_DIM = 7
# Normalisers that only symmetric matrices have.
SYMMETRIC_NORMALIZERS = ("newton_schulz", *APPROXIMANTS, "eigen", "log")


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How visual tokens become one vector. Raises ValueError for bad settings.

    `Pooling.named` gives the settings of the papers' methods.
    """

    type: PoolingType = "cross_cov"
    """"cross_cov" is So-ViT's, "multi_head" SoT's, "cov" the covariance of MPN-COV and
    iSQRT-COV, "gaussian" the embedding of a Gaussian's mean and covariance, "moment"
    the head of Moment Probing (`sovit.moment_pool`), "avg" the mean of the tokens,
    which uses none of the other settings."""

    reduced_dim: int | tuple[int, int] | None = (48, 24)
    """Channels that a linear map (a 1x1 convolution) narrows the tokens to: of the two
    sides of a cross-covariance, of each head with many; one number for "cov" and
    "gaussian", where None leaves the tokens as they are."""

    progressive_dims: tuple[int, ...] = ()
    """Widths of further such maps before `reduced_dim`, for "cov" and "gaussian"."""

    num_groups: int = 1
    """Groups of channels with a covariance each, for "cov" and "gaussian"."""

    num_heads: int = 1
    """Cross-covariances side by side; of "moment" the heads, at least 2, of which
    neighbours are multiplied."""

    act_layer: Literal["relu", "relu6"] = "relu"
    """Activation after the linear maps of "cov" and "gaussian"."""

    centering: Literal["channel", "scalar", "none"] = "channel"
    """The mean taken off before: see `sovit.moments.center`. "gaussian" keeps it."""

    channel_drop: Number | Literal["batch", "image"] = 0.0
    """Dropout of whole channels before "cov" and "gaussian": DropCov's adaptive rate,
    for a batch or for each image (`sovit.drop_cov`), or a fixed one under 1."""

    token_drop: Number = 0.0
    """Dropout of whole tokens before a covariance, under 1: a mask for each head."""

    normalizer: Normalizer = "svpn"
    """"svpn" takes a power of the singular values fast (`sovit.svpn`), "svd" exactly;
    of symmetric matrices "newton_schulz" takes the root fast, "mpa" and "mtp" by one
    rational function or polynomial, "eigen" a power exactly, "log" the logarithm.
    "signed_sqrt" (of each element, with `power`), "layer_norm", "scale" (by 1 / sqrt of
    the width) and "learned_scale" are those to compare with."""

    shrinkage: Number = 0.0
    """Share, under 1, of a symmetric matrix that gives way to its mean eigenvalue
    before it is normalised: (1 - l) S + l tr(S) / d I."""

    power: Number = 0.5
    """Exponent of "svpn", "svd", "eigen" and "signed_sqrt"."""

    num_iterations: int = 1
    """Iterations of "svpn" and "newton_schulz"."""

    pre_norm: Literal["trace", "frobenius", "s4"] = "trace"
    """What "newton_schulz" divides by before it iterates."""

    coefficients: Literal["newton_schulz", "minimax"] = "newton_schulz"
    """Of the steps of "newton_schulz": the papers', or the best for as many steps."""

    max_gain: Number | None = None
    """Bound on what "minimax" multiplies small eigenvalues and their gradients by."""

    num_singular_values: int | None = 1
    """Singular values that "svpn" looks for; None takes all of them."""

    start: Start = "learned"
    """The start of the power iteration: a trained vector or fixed ones."""

    def __post_init__(self) -> None:
        """Reject invalid settings."""
        for name, wanted in _CHOICES.items():
            _check(self, name, getattr(self, name) in wanted, f"one of {wanted}")
        for name in ("reduced_dim", "progressive_dims"):
            if isinstance(getattr(self, name), list):
                # Settings that were kept as JSON come back with lists.
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("token_drop", "shrinkage"):
            _check(self, name, 0 <= getattr(self, name) < 1, "from 0 to under 1")
        for name in ("num_heads", "num_iterations", "num_groups"):
            _check(self, name, _is_count(getattr(self, name)), "a positive integer")
        _check(self, "power", 0 < self.power <= 1, "over 0 and at most 1")
        # Raises ValueError for what the steps can't be.
        find_coefficients(
            self.num_iterations, coefficients=self.coefficients, max_gain=self.max_gain
        )
        fits = (
            self.coefficients == COEFFICIENTS[0] or self.normalizer == "newton_schulz"
        )
        _check(
            self, "coefficients", fits, f"{COEFFICIENTS[0]!r} for {self.normalizer!r}"
        )
        if self.type in SYMMETRIC_TYPES:
            self._check_symmetric()
        elif self.type == "moment":
            self._check_moment()
        elif self.type != "avg":
            self._check_rectangular()
        if self.type not in SYMMETRIC_TYPES:
            for name in ("channel_drop", "shrinkage"):
                fits = not getattr(self, name)
                _check(self, name, fits, f"0, for it is of {SYMMETRIC_TYPES},")

    def _check_symmetric(self) -> None:
        dim, num_groups = self.reduced_dim, self.num_groups
        fits = dim is None or _is_count(dim)
        _check(
            self, "reduced_dim", fits, f"one positive integer or None for {self.type!r}"
        )
        fits = not isinstance(dim, int) or dim % num_groups == 0
        _check(self, "num_groups", fits, f"a divisor of reduced_dim, {dim}")
        _check(self, "num_heads", self.num_heads == 1, "1 here: num_groups divides")
        fits = all(_is_count(one) for one in self.progressive_dims)
        _check(self, "progressive_dims", fits, "positive integers")
        drop = self.channel_drop
        fits = drop in ("batch", "image") or (
            not isinstance(drop, str) and 0 <= drop < 1
        )
        _check(
            self, "channel_drop", fits, "'batch', 'image' or a number from 0 to under 1"
        )
        fits = self.normalizer != "svd"
        _check(self, "normalizer", fits, "'eigen' for symmetric matrices")
        self._check_singular_values(dim // num_groups if isinstance(dim, int) else None)

    def _check_moment(self) -> None:
        dim = self.reduced_dim
        fits = isinstance(dim, int) and dim >= _LEAST_MOMENT_DIM
        _check(self, "reduced_dim", fits, f"a number of at least {_LEAST_MOMENT_DIM}")
        _check(self, "num_heads", self.num_heads >= 2, "at least 2 for 'moment'")
        _check(self, "normalizer", self.normalizer == "none", "'none' for 'moment'")
        _check(self, "token_drop", not self.token_drop, "0 for 'moment'")

    def _check_rectangular(self) -> None:
        dims = self.reduced_dim
        pair = dims if isinstance(dims, tuple) else (dims, dims)
        fits = len(pair) == 2 and all(_is_count(dim) for dim in pair)
        _check(self, "reduced_dim", fits, "a positive integer or a pair of them")
        fits = self.normalizer not in SYMMETRIC_NORMALIZERS
        wanted = (
            f"none of {SYMMETRIC_NORMALIZERS} for {self.type!r}, whose matrices are"
        )
        _check(self, "normalizer", fits, f"{wanted} not symmetric")
        _check(self, "num_groups", self.num_groups == 1, "1 here: num_heads divides")
        fits = not self.progressive_dims
        _check(self, "progressive_dims", fits, f"empty for {self.type!r}")
        self._check_singular_values(min(self.reduced_dims))

    def _check_singular_values(self, limit: int | None) -> None:
        count = self.num_singular_values
        fits = count is None or (_is_count(count) and (limit is None or count <= limit))
        wanted = f"from 1 to the smaller reduced_dim, {limit}, or None for all"
        _check(self, "num_singular_values", fits, wanted)

    @property
    def reduced_dims(self) -> tuple[int, int]:
        """`reduced_dim` as a pair."""
        dims = self.reduced_dim
        assert dims is not None, "only symmetric poolings have no reduced_dim"
        return (dims, dims) if isinstance(dims, int) else (dims[0], dims[1])

    def changed(self, fields: Mapping[str, Any]) -> Pooling:
        """Return these settings with some fields changed, or raise ValueError."""
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(
                f"Pooling: expected fields of {known}, got {unknown}; check the "
                "spelling"
            )
        return dataclasses.replace(self, **fields)

    @classmethod
    def named(cls, name: str, **changes: Any) -> Pooling:
        """Return the settings of a method by its name, with some fields changed.

        "mpn_cov" (arXiv 1703.08050), "isqrt_cov" (arXiv 1712.01034, five iterations),
        "gaussian" and "cov" at 256 channels; "svpn" (arXiv 2104.10935) and
        "multi_head_svpn" (v2 of it) at So-ViT-7's and SoT-Tiny's widths; "drop_cov" of
        DropCov's ResNets and "drop_cov_tokens" of its transformers, which want
        drop_rate=0.5 besides (NeurIPS 2022); "moment" of Moment Probing (ICCV 2023),
        with fusion="mean"; "avg".
        """
        if name not in METHODS:
            raise ValueError(
                f"expected a pooling of {list(METHODS)}, got {name!r}; take one of "
                "these, or give sovit.Pooling(...)"
            )
        return cls(**METHODS[name]).changed(changes)


_CHOICES = {
    "type": get_args(PoolingType),
    "centering": CENTERINGS,
    "normalizer": get_args(Normalizer),
    "start": get_args(Start),
    "pre_norm": PRE_NORMS,
    "coefficients": COEFFICIENTS,
    "act_layer": ("relu", "relu6"),
}

_ISQRT = {"reduced_dim": 256, "normalizer": "newton_schulz", "num_iterations": 5}
METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "avg": {"type": "avg"},
        "cov": {"type": "cov", "reduced_dim": 256, "normalizer": "none"},
        "mpn_cov": {"type": "cov", "reduced_dim": 256, "normalizer": "eigen"},
        "isqrt_cov": {"type": "cov", **_ISQRT},
        "gaussian": {"type": "gaussian", **_ISQRT},
        "svpn": {"type": "cross_cov"},
        "drop_cov": {
            "type": "cov",
            "reduced_dim": 128,
            "channel_drop": "batch",
            "normalizer": "none",
        },
        "drop_cov_tokens": {
            "type": "multi_head",
            "reduced_dim": 24,
            "num_heads": 6,
            "centering": "scalar",
            "token_drop": 0.2,
            "normalizer": "none",
        },
        "moment": {
            "type": "moment",
            "reduced_dim": 128,
            "num_heads": 4,
            "centering": "scalar",
            "normalizer": "none",
        },
        "multi_head_svpn": {
            "type": "multi_head",
            "reduced_dim": 14,
            "num_heads": 6,
            "centering": "scalar",
        },
    }
)


def as_pooling(
    value: Pooling | Mapping[str, Any] | str, *, default: Pooling
) -> Pooling:
    """Return settings given whole, by a method's name, or as changes of the default."""
    if isinstance(value, Pooling):
        return value
    return Pooling.named(value) if isinstance(value, str) else default.changed(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(pooling: Pooling, name: str, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(
            f"Pooling.{name}: expected {wanted}, got {getattr(pooling, name)!r}; set "
            f"pooling={{'{name}': ...}} to such a value"
        )


# A checker of annotations would refuse a bad setting before its reason can be told.
no_type_check(Pooling.__init__)
