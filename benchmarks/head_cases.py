"""Pair each method of `benchmarks.heads` with the straightforward one, and an input.

The straightforward is the same mathematics in PyTorch's operations with its autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from sovit.moments import append_one, covariance
from sovit.newton_schulz import covariance_sqrt, newton_schulz_sqrt
from sovit.normalize import signed_sqrt
from sovit.powers import covariance_power, matrix_log, matrix_power
from sovit.spectral import PLACEMENTS
from sovit.svpn import svpn

Function = Callable[[Tensor], Tensor]
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two functions with equal results, and their input."""

    name: str
    ours: Function
    plain: Function
    shape: tuple[int, ...]
    """Tokens (B, N, D), drawn as features after a ReLU."""
    of_matrix: bool = False
    """Whether the functions take the tokens' covariance instead."""
    num_rows: int | None = None
    """Rows of that covariance which are taken; all by default."""
    exact: Function | None = None
    """What both approximate, if they need not agree: ours must be no further off."""

    def input(self, device: str) -> Tensor:
        """Draw the input."""
        generator = torch.Generator().manual_seed(_SEED)
        tokens = torch.randn(self.shape, generator=generator)
        # A falling spectrum, as features have, not that of white noise.
        tokens = (tokens / torch.arange(1, self.shape[-1] + 1) ** 0.5).relu()
        if self.of_matrix:
            tokens = _covariance(tokens)[:, : self.num_rows].contiguous()
        return tokens.to(device)


def cases(batch_size: int, *, device: str = "cpu") -> list[Case]:
    """List the heads at the papers' sizes: 14x14 and 7x7 positions.

    On an accelerator the exact heads also come with each placement of the
    decomposition, forced.
    """
    placements = ("auto",) if device == "cpu" else PLACEMENTS
    matrices = partial(Case, of_matrix=True)
    # So-ViT-14 trains on 64 images a device; a machine with much memory takes more.
    found = [_svpn_case(2 * batch_size), _svpn_case(8 * batch_size)]
    found += [
        matrices(
            name=f"Newton-Schulz, {dim}x{dim}, N=5",
            ours=newton_schulz_sqrt,
            plain=_newton_schulz,
            shape=(batch_size, 196, dim),
        )
        for dim in (64, 128, 256)
    ]
    found.append(
        matrices(
            name="minimax N=3 for Newton-Schulz N=5",
            ours=partial(newton_schulz_sqrt, num_iterations=3, coefficients="minimax"),
            plain=newton_schulz_sqrt,
            shape=(batch_size, 196, 256),
            exact=matrix_power,
        )
    )
    for num_tokens in (196, 49):
        tokens = f"{num_tokens} tokens of 256"
        case = partial(Case, shape=(batch_size, num_tokens, 256))
        found.append(
            case(name=f"iSQRT-COV, {tokens}", ours=covariance_sqrt, plain=_isqrt_cov)
        )
        for placement in placements:
            where = "" if placement == "auto" else f", on the {placement}"
            ours = partial(covariance_power, placement=placement)
            name = f"MPN-COV, {tokens}{where}"
            found.append(case(name=name, ours=ours, plain=_mpn_cov))
        found.append(
            case(
                name=f"Gaussian, {tokens}",
                ours=lambda x: covariance_sqrt(append_one(x), centering="none"),
                plain=_gaussian,
            )
        )
    return found


def _svpn_case(batch_size: int) -> Case:
    start = torch.randn(64, generator=torch.Generator().manual_seed(_SEED))
    return Case(
        name=f"svPN, 48x64, batch {batch_size}",
        ours=lambda x: svpn(x, start.to(x)),
        plain=lambda x: _svpn(x, start.to(x)),
        shape=(batch_size, 196, 64),
        of_matrix=True,
        num_rows=48,
    )


def _covariance(x: Tensor) -> Tensor:
    x = x - x.mean(dim=1, keepdim=True)
    return x.mT @ x / x.shape[1]


def _newton_schulz(x: Tensor) -> Tensor:
    """Take the square root by five iterations, from Y = x / trace, Z = I."""
    trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    y, z = x / trace, eye
    for _ in range(5):
        t = 0.5 * (3 * eye - z @ y)
        y, z = y @ t, t @ z
    return y * trace.sqrt()


def _isqrt_cov(x: Tensor) -> Tensor:
    return _newton_schulz(_covariance(x))


def _gaussian(x: Tensor) -> Tensor:
    with_one = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    return _newton_schulz(with_one.mT @ with_one / x.shape[1])


def _mpn_cov(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_covariance(x))
    return (vectors * values.clamp(min=1e-5).sqrt().unsqueeze(-2)) @ vectors.mT


def _svpn(x: Tensor, start: Tensor) -> Tensor:
    """Take the square root of the largest singular value, by one power iteration."""
    v = start.expand(len(x), -1).unsqueeze(-1)
    u = functional.normalize(x @ v, dim=1)
    v = functional.normalize(x.mT @ u, dim=1)
    s = u.mT @ x @ v
    outer = u @ v.mT
    return s**0.5 * outer + (x - s * outer) / (s**0.5 + 1e-5)


def curves() -> dict[str, Function]:
    """Return the plot's curves: functions of tokens by name."""
    return {
        "covariance alone": covariance,
        "svPN": lambda x: svpn(covariance(x), torch.ones_like(x[0, 0])),
        "signed root": lambda x: signed_sqrt(covariance(x)),
        "Newton-Schulz, N=3": partial(covariance_sqrt, num_iterations=3),
        "Newton-Schulz, N=5": covariance_sqrt,
        "Newton-Schulz, straightforward": _isqrt_cov,
        "eigenvalues": covariance_power,
        "logarithm": lambda x: matrix_log(covariance(x)),
    }
