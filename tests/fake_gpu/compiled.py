"""Compile steps on the fake GPU, and count their graphs.

PyTorch compiles nothing for fake tensors. So these have memory, the stand-in's, whose
kernels do nothing; and what the compiler was given is not run, but answered by memory
of the shape that it would have: no cuDNN is there to be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo import reset
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from pipelines.config import Run
from pipelines.training.compiling import why_not
from tests.fake_gpu.device import GPU, without_weights
from tests.fake_gpu.steps import take_steps
from tests.fake_gpu.watch import Watch


def take_compiled_steps(watch: Watch, run: Run) -> dict[str, Any]:
    """Take steps of a compiled network; return its graphs' number and breaks.

    The watch notices waits alone: no mode is entered.
    """
    num = {"forward": 0, "backward": 0}

    def count(module: Any, _: Sequence[Any], *, kind: str) -> Callable[..., Any]:
        num[kind] += 1
        return _answering(module)

    backend = aot_autograd(
        fw_compiler=partial(count, kind="forward"),
        bw_compiler=partial(count, kind="backward"),
    )
    compile_so = partial(torch.compile, backend=backend)
    with without_weights(), mock.patch.object(torch, "compile", compile_so):
        assert not why_not(GPU)  # it is tried once, and this is no step's graph
        num.update(forward=0, backward=0)
        reset()
        counters.clear()
        take_steps(watch, run)
    breaks = [reason.splitlines()[0] for reason in counters["graph_break"]]
    return {"num_graphs": num, "breaks": breaks}


def _answering(module: Any) -> Callable[..., Any]:
    """Return a function that allocates a graph's outputs without computing them."""
    (outputs,) = module.graph.output_node().args
    wanted = [getattr(node, "meta", {}).get("val", node) for node in outputs]

    def answer(arguments: list[Any]) -> list[Any]:
        arguments.clear()
        return [_empty(value) for value in wanted]

    vars(answer)["_boxed_call"] = True  # so AOT autograd gives a list to be cleared
    return answer


def _empty(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(
        value.size(), value.stride(), dtype=value.dtype, device=value.device
    )
