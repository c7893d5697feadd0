"""How steps are computed is decided, told and given back; what can't be is one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.cli.command import parse
from pipelines.config import Run, Scale
from pipelines.config.overrides import change_fields
from pipelines.config.serialization import from_json, to_json
from pipelines.hardware.device import numerics_kept
from pipelines.training import compiling
from pipelines.training.compiling import decide
from pipelines.training.state import build_state
from tests.small_runs import CPU, small_run, state_of
from tests.test_loop import batch_of, pictures, run_loop


@pytest.fixture(autouse=True)
def _numerics() -> Iterator[None]:
    with numerics_kept():
        yield


@pytest.mark.parametrize(
    ("scale", "lack", "is_on", "told"),
    [
        (Scale(), "never asked", False, "--scale.compile auto does so on GPUs alone"),
        (Scale(compile=False, use_gpu=True), "", False, "not compiled: --scale.no-com"),
        (Scale(use_gpu=True), "", True, "steps are compiled: the first takes a min"),
        (Scale(compile=True), "", True, "(--scale.no-compile leaves that out)"),
        (Scale(use_gpu=True), "no g++", False, "and, on a GPU, Triton, and worker 0"),
        (Scale(compile=True), "no g++", False, "worker 0 got: no g++"),
    ],
)
def test_what_is_decided_is_told_with_its_reason(
    scale: Scale, lack: str, is_on: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "why_not", lambda device: lack)
    found = decide(scale, device=CPU)
    assert found.is_on == is_on
    assert told in found.line
    assert "\n" not in found.line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("C++ compile error\n\nCommand:\ng++\n\nOutput:\na.cpp:1:10: fatal error: "
         "Python.h: No such file", "a.cpp:1:10: fatal error: Python.h: No such file"),
        ("\nInvalidCxxCompiler: none\n\nSet TORCHDYNAMO", "InvalidCxxCompiler: none"),
        ("", "RuntimeError"),
        ("x" * 999, "x" * 200),
    ],
)  # fmt: skip
def test_the_reason_is_the_line_that_says_something(text: str, line: str) -> None:
    assert compiling._line_of(RuntimeError(text)) == line


@pytest.mark.parametrize("default", ["auto", True, False])
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--scale.compile"], True),
        (["--scale.no-compile"], False),
        (["--scale.no_compile", "--seed", "3"], False),
        (["--scale.compile", "--seed", "3"], True),
        (["--scale.compile", "auto"], "auto"),
        (["--scale.compile", "False"], False),
        (["--scale.compile=True"], True),
    ],
)
def test_the_flag_is_a_choice_and_still_a_flag(
    default: Any, flags: list[str], wanted: Any
) -> None:
    run = dataclasses.replace(small_run("none"), scale=Scale(compile=default))
    found = parse(Run, default=run, arguments=flags, prog="sovit-train")
    assert found.scale.compile == wanted
    assert found.seed == (3 if "--seed" in flags else run.seed)


def test_runs_that_were_stored_with_yes_or_no_are_read() -> None:
    raw = json.loads(to_json(small_run("none")))
    assert raw["scale"]["compile"] == "auto"
    for stored in (True, False):
        raw["scale"]["compile"] = stored
        run = from_json(json.dumps(raw))
        assert run.scale.compile is stored
        assert change_fields(run, {"scale.compile": "auto"}).scale.compile == "auto"
        assert change_fields(small_run("none"), {"scale.compile": stored}).scale == (
            dataclasses.replace(small_run("none").scale, compile=stored)
        )


def test_a_state_is_built_with_what_the_run_wants_of_numbers() -> None:
    run = small_run("none")
    for scale in (Scale(deterministic=True, matmul_precision="high"), Scale()):
        wanted = dataclasses.replace(run, scale=scale)
        build_state(wanted, num_classes=3, device=CPU)
        assert torch.are_deterministic_algorithms_enabled() == scale.deterministic
        assert torch.get_float32_matmul_precision() == scale.matmul_precision
        assert torch.backends.cudnn.benchmark != scale.deterministic


def test_short_gradients_are_of_whole_models() -> None:
    with pytest.raises(
        ValueError, match=r"expected float32 with --scale\.sharding fsdp"
    ):
        Scale(gradient_dtype="bfloat16", sharding="fsdp")


class Putting(nn.Module):
    """Take a step by an operation that PyTorch has in no deterministic kind."""

    def __init__(self, model: nn.Module, *, when: str) -> None:
        super().__init__()
        self.model, self._when = model, when

    def forward(self, images: Tensor) -> Tensor:
        """Put a value, in one of the two passes; numbers stay."""
        logits = self.model(images)
        if self._when == "forward":
            put(logits)
        else:
            logits.register_hook(put)
        return logits


def put(x: Tensor) -> None:
    x.detach().clone().put_(torch.tensor([0]), torch.tensor([0.0]))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_model_that_has_no_deterministic_kernel_is_one_line(when: str) -> None:
    run = small_run("none")
    state = state_of(run)
    state.forward = Putting(state.model, when=when)
    batch = batch_of(*pictures(4))
    run_loop(state, [batch], run=run)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(ValueError, match=r"got one with put_.*--scale\.no-determ"):
        run_loop(state, [batch], run=run)


def test_a_step_that_can_not_be_compiled_is_one_line() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise TypeError("no such\nkernel")

    run = small_run("none")
    state = state_of(run)
    state.forward = torch.compile(state.model, backend=broken)  # pyright: ignore
    with pytest.raises(ValueError, match=r"--scale\.no-compile$") as caught:
        run_loop(state, [batch_of(*pictures(4))], run=run)
    assert "scale.compile: expected a step that torch.compile can" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_of_a_step_stay_what_they_are() -> None:
    run = small_run("none")
    state = state_of(run)
    images, labels = pictures(4)
    with pytest.raises(RuntimeError) as caught:
        run_loop(state, [batch_of(images[:, :2], labels)], run=run)
    assert type(caught.value) is RuntimeError
