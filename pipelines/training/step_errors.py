"""Explain in one line what PyTorch can't do in a step, and which setting needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_NOT_DETERMINISTIC = " does not have a deterministic implementation"
_COMPILERS = ("torch._dynamo", "torch._inductor")


@contextlib.contextmanager
def step_errors() -> Iterator[None]:
    """Convert PyTorch's errors that a setting of the run causes into ValueErrors.

    They are not retryable: a restart would cause them again.
    """
    try:
        yield
    except RuntimeError as error:
        first = next(iter(str(error).strip().splitlines()), "")
        if _NOT_DETERMINISTIC in first:
            raise ValueError(
                "scale.deterministic: expected a model of operations that this device "
                "has deterministic kernels for, got one with "
                f"{first.partition(_NOT_DETERMINISTIC)[0]}; set "
                "--scale.no-deterministic, or take a model without it (of GSoP, the "
                "attention channel in model.kwargs)"
            ) from error
        if type(error).__module__.startswith(_COMPILERS):
            raise ValueError(
                "scale.compile: expected a step that torch.compile can compile, got "
                f"{type(error).__name__}: {first}; set --scale.no-compile"
            ) from error
        raise
