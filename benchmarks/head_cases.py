"""Pair each method of `benchmarks.heads`, ours and straightforward, with an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import straightforward as plain
from sovit.moments import append_one, covariance
from sovit.newton_schulz import covariance_sqrt, newton_schulz_sqrt
from sovit.normalize import signed_sqrt
from sovit.powers import covariance_power, matrix_log, matrix_power
from sovit.spectral import PLACEMENTS
from sovit.svpn import svpn

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two functions with equal results, and their input."""

    name: str
    ours: Callable[[Tensor], Tensor]
    straightforward: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    """Tokens (B, N, D), drawn as features after a ReLU."""
    of_matrix: bool = False
    """Whether the functions take the tokens' covariance instead."""
    num_rows: int | None = None
    """Rows of that covariance which are taken; all by default."""
    exact: Callable[[Tensor], Tensor] | None = None
    """What both approximate, if they need not agree: ours must be no further off."""

    def input(self, device: str) -> Tensor:
        """Draw the input."""
        generator = torch.Generator().manual_seed(_SEED)
        tokens = torch.randn(self.shape, generator=generator)
        # A falling spectrum, as features have, not that of white noise.
        tokens = (tokens / torch.arange(1, self.shape[-1] + 1) ** 0.5).relu()
        if not self.of_matrix:
            return tokens.to(device)
        return plain.covariance(tokens)[:, : self.num_rows].contiguous().to(device)


def cases(batch_size: int, *, device: str = "cpu") -> list[Case]:
    """List the heads at the papers' sizes: 14x14 and 7x7 positions.

    On an accelerator the exact heads also come with each placement of the
    decomposition, forced.
    """
    placements = ("auto",) if device == "cpu" else PLACEMENTS
    # So-ViT-14 trains on 64 images a device; a machine with much memory takes more.
    found = [_svpn_case(2 * batch_size), _svpn_case(8 * batch_size)]
    for dim in (64, 128, 256):
        found.append(
            Case(
                name=f"Newton-Schulz, {dim}x{dim}, N=5",
                ours=newton_schulz_sqrt,
                straightforward=plain.newton_schulz,
                shape=(batch_size, 196, dim),
                of_matrix=True,
            )
        )
    found.append(
        Case(
            name="minimax N=3 for Newton-Schulz N=5",
            ours=partial(newton_schulz_sqrt, num_iterations=3, coefficients="minimax"),
            straightforward=newton_schulz_sqrt,
            shape=(batch_size, 196, 256),
            of_matrix=True,
            exact=matrix_power,
        )
    )
    for num_tokens in (196, 49):
        shape = (batch_size, num_tokens, 256)
        found += [
            Case(
                name=f"iSQRT-COV, {num_tokens} tokens of 256",
                ours=covariance_sqrt,
                straightforward=lambda x: plain.newton_schulz(plain.covariance(x)),
                shape=shape,
            ),
            *(_exact_case(shape, placement) for placement in placements),
            Case(
                name=f"Gaussian, {num_tokens} tokens of 256",
                ours=lambda x: covariance_sqrt(append_one(x), centering="none"),
                straightforward=_plain_gaussian,
                shape=shape,
            ),
        ]
    return found


def _exact_case(shape: tuple[int, int, int], placement: str) -> Case:
    where = "" if placement == "auto" else f", on the {placement}"
    return Case(
        name=f"MPN-COV, {shape[1]} tokens of 256{where}",
        ours=partial(covariance_power, placement=placement),
        straightforward=lambda x: plain.eigen_power(plain.covariance(x)),
        shape=shape,
    )


def _svpn_case(batch_size: int) -> Case:
    start = torch.randn(64, generator=torch.Generator().manual_seed(_SEED))
    return Case(
        name=f"svPN, 48x64, batch {batch_size}",
        ours=lambda x: svpn(x, start.to(x)),
        straightforward=lambda x: plain.svpn(x, start.to(x)),
        shape=(batch_size, 196, 64),
        of_matrix=True,
        num_rows=48,
    )


def _plain_gaussian(x: Tensor) -> Tensor:
    with_one = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    return plain.newton_schulz(with_one.mT @ with_one / x.shape[1])


def curves() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the plot's curves: functions of tokens by name."""
    return {
        "covariance alone": covariance,
        "svPN": lambda x: svpn(covariance(x), torch.ones_like(x[0, 0])),
        "signed root": lambda x: signed_sqrt(covariance(x)),
        "Newton-Schulz, N=3": partial(covariance_sqrt, num_iterations=3),
        "Newton-Schulz, N=5": covariance_sqrt,
        "Newton-Schulz, straightforward": lambda x: plain.newton_schulz(
            plain.covariance(x)
        ),
        "eigenvalues": covariance_power,
        "logarithm": lambda x: matrix_log(covariance(x)),
    }
