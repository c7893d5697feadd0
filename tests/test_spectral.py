"""Where eigenvalues are found: the same values, one way there and one back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from sovit.moments import covariance
from sovit.powers import covariance_power, matrix_log, matrix_power
from sovit.spectral import PLACEMENTS, symmetric_eig
from tests.matrices import normal, semidefinite

EXACT: dict[str, Callable[..., Tensor]] = {
    "power": lambda x, **more: matrix_power(covariance(x), **more),
    "logarithm": lambda x, **more: matrix_log(covariance(x), **more),
    "covariance": covariance_power,
}


class Steps(TorchDispatchMode):
    """Note decompositions, and copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_linalg_eigh":
            self.seen.append(f"eigh on {args[0].device.type}")
        elif name == "_to_copy" and out.device != args[0].device:
            waits = "" if (kwargs or {}).get("non_blocking") else ", waiting"
            self.seen.append(f"to {out.device.type}{waits}")
        return out


@contextmanager
def on_a_gpu(*shape: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield matrices on a GPU that is not there, and what is done to them."""
    with FakeTensorMode(), Steps() as steps:
        yield torch.empty(shape, device="cuda"), steps.seen


@pytest.mark.parametrize("function", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("num_tokens", [5, 50])
def test_placements_have_the_same_values_and_gradients(
    function: Callable[..., Tensor], num_tokens: int
) -> None:
    x = normal(3, num_tokens, 40).requires_grad_()
    weight = normal(3, 40, 40, seed=1)
    found = []
    for placement in PLACEMENTS:
        y = function(x, placement=placement)
        found.append((y, *torch.autograd.grad((y * weight).sum(), x)))
    for y, grad in found[1:]:
        torch.testing.assert_close(y, found[0][0], rtol=0, atol=0)
        torch.testing.assert_close(grad, found[0][1], rtol=0, atol=0)


ON_DEVICE = ["eigh on cuda"]
ON_HOST = ["to cpu, waiting", "eigh on cpu", "to cuda", "to cuda"]


@pytest.mark.parametrize(
    ("placement", "version", "shape", "wanted"),
    [
        ("device", "2.7.1", (4, 49, 49), ON_DEVICE),
        ("host", "2.15.0", (4, 49, 49), ON_HOST),
        ("auto", "2.15.0", (4, 49, 49), ON_DEVICE),
        ("auto", "2.12.0+cu132", (4, 256, 256), ON_DEVICE),
        ("auto", "2.11.0+cu130", (4, 49, 49), ON_HOST),
        ("auto", "2.11.0+cu130", (2, 2, 33, 33), ON_HOST),
        ("auto", "2.11.0+cu130", (4, 32, 32), ON_DEVICE),
        ("auto", "2.11.0+cu130", (1, 49, 49), ON_DEVICE),
    ],
)
def test_a_gpu_decomposes_where_it_is_fastest(
    placement: str,
    version: str,
    shape: tuple[int, ...],
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with on_a_gpu(*shape) as (x, seen):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        results = [*symmetric_eig(x, placement=placement)]
        assert seen == wanted
        assert [y.shape for y in results] == [shape[:-1], shape]
        results.append(matrix_power(x, placement=placement))
        assert seen == 2 * wanted
        assert {y.device.type for y in results} == {"cuda"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_meta_tensors_are_counted_with_by_every_pytorch(
    placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    found = symmetric_eig(torch.empty(4, 49, 49, device="meta"), placement=placement)
    assert [(y.shape, y.is_meta) for y in found] == [
        ((4, 49), True),
        ((4, 49, 49), True),
    ]


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="placement: expected one of"):
        symmetric_eig(torch.eye(3), placement="gpu")


@pytest.mark.skipif(
    not hasattr(torch.linalg, "matrix_sqrth"), reason="this PyTorch has no such root"
)
def test_the_root_is_pytorchs_where_that_is_defined() -> None:
    x = semidefinite(3, dim=6, rank=20).requires_grad_()
    weight = normal(3, 6, 6, seed=1)
    weight = weight + weight.mT
    found = []
    for function in (matrix_power, torch.linalg.matrix_sqrth):
        y = function(x)
        found.append((y, *torch.autograd.grad((y * weight).sum(), x)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
