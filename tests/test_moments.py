"""Covariances against NumPy's, and in every precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sovit.moments import (
    center,
    covariance,
    cross_covariance,
    gaussian_embedding,
    upper_triangle,
)
from tests.matrices import check_autocast


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) + 2


def test_covariance_is_the_biased_one_of_numpy() -> None:
    x = tokens(3, 50, 6)
    wanted = np.stack([np.cov(one.T, bias=True) for one in x.numpy()])
    np.testing.assert_allclose(covariance(x).numpy(), wanted, rtol=1e-10)


def test_cross_covariance_is_a_block_of_the_joint_covariance() -> None:
    x, y = tokens(50, 4), tokens(50, 7).sin()
    joint = np.cov(torch.cat([x, y], dim=1).numpy().T, bias=True)
    np.testing.assert_allclose(
        cross_covariance(x, y).numpy(), joint[:4, 4:], rtol=1e-10, atol=1e-12
    )


def test_centerings_take_off_the_mean_they_name() -> None:
    x = tokens(2, 9, 5)
    by_channel = center(x, centering="channel").mean(dim=1)
    torch.testing.assert_close(by_channel, torch.zeros_like(by_channel))
    by_scalar = center(x, centering="scalar")
    torch.testing.assert_close(by_scalar.mean(dim=(1, 2)), torch.zeros(2).double())
    assert by_scalar.mean(dim=1).abs().max() > 1e-3
    assert center(x, centering="none") is x
    with pytest.raises(ValueError, match="centering: expected one of"):
        center(x, centering="rows")


@pytest.mark.parametrize("centering", ["channel", "scalar", "none"])
def test_gradients_are_right(centering: str) -> None:
    x, y = tokens(2, 5, 3).requires_grad_(), tokens(2, 5, 4).sin().requires_grad_()

    def moment(x: Tensor, y: Tensor) -> Tensor:
        return cross_covariance(x, y, centering=centering)

    assert torch.autograd.gradcheck(moment, (x, y))
    assert torch.autograd.gradgradcheck(moment, (x, y))


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_lowers_neither_direction(backward_inside: bool) -> None:
    y = tokens(2, 49, 8, dtype=torch.float32)
    check_autocast(
        lambda x: cross_covariance(x, y),
        tokens(2, 49, 6),
        backward_inside=backward_inside,
    )


def test_half_precision_tokens_are_summed_in_float32() -> None:
    x = tokens(1, 196, 8, dtype=torch.bfloat16)
    got = covariance(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), covariance(x.double()), rtol=1e-4, atol=1e-6
    )


def test_vmap_maps_over_images() -> None:
    x, y = tokens(4, 9, 3), tokens(4, 9, 5)
    torch.testing.assert_close(
        torch.vmap(cross_covariance)(x, y), cross_covariance(x, y)
    )


def test_gaussian_embedding_holds_mean_and_covariance() -> None:
    x = tokens(3, 50, 6)
    mean = x.mean(dim=1)
    got = gaussian_embedding(x)
    second = covariance(x) + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    torch.testing.assert_close(got[:, :6, :6], second)
    torch.testing.assert_close(got[:, 6, :6], mean)
    torch.testing.assert_close(got[:, 6, 6], torch.ones(3).double())
    torch.testing.assert_close(got, got.mT)


def test_upper_triangle_is_numpys() -> None:
    x = tokens(2, 3, 5, 5)
    wanted = x.numpy()[..., *np.triu_indices(5)]
    np.testing.assert_array_equal(upper_triangle(x).numpy(), wanted)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(upper_triangle(x).sum(), x)
    assert torch.equal(grad, torch.ones(2, 3, 5, 5).double().triu())
