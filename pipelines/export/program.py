"""Export a model as a torch.export program with a dynamic batch size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pipelines.export.subject import Subject

PROGRAM = "model.pt2"
CARD = "card.json"
"""What the card is called among a program's extra files."""


def to_program(subject: Subject) -> ExportedProgram:
    """Trace a model into a graph with a dynamic batch dimension.

    Raises ValueError, with torch's own first words, where it can't be traced so.
    """
    size = subject.img_size
    images = torch.zeros(2, 3, size, size)
    try:
        with torch.no_grad():
            program = torch.export.export(
                subject.model,
                (images,),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except Exception as error:  # torch has a dozen for what it can't trace
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            "expected a model that torch.export takes with any number of images, got "
            f"{subject.settings.name}, where it says: {line[:200]}; export it with "
            "--formats timm"
        ) from error
    _forget_places(program)
    return program


def write_program(
    path: Path, program: ExportedProgram, *, card: Mapping[str, Any]
) -> None:
    """Write a program with its card as the extra file `card.json`."""
    torch.export.save(program, path, extra_files={CARD: json.dumps(card)})


def load_program(path: Path, *, card: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Load a program that was just written, and check its card."""
    extra_files = {CARD: ""}
    program = torch.export.load(path, extra_files=extra_files)
    assert json.loads(extra_files[CARD]) == card
    return program.module()


def nodes_of(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    """Yield all nodes, those of the subgraphs of autocast contexts too."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def _forget_places(program: ExportedProgram) -> None:
    """Remove each node's stack trace, which has paths of this machine."""
    for node in nodes_of(program):
        node.meta.pop("stack_trace", None)
