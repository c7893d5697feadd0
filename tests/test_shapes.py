"""The package without the developers' tools, and under PyTorch's compilers."""

from __future__ import annotations

from tests.bare import POOLINGS, BareProcesses


def test_works_compiles_and_exports_with_torch_and_timm_alone(
    bare_processes: BareProcesses,
) -> None:
    assert bare_processes.printed(POOLINGS).splitlines()[-1] == "loaded: []"
