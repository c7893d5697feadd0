"""The package without the developers' tools, and under PyTorch's compilers."""

from __future__ import annotations

from tests.bare import POOLINGS, printed


def test_works_compiles_and_exports_with_torch_and_timm_alone() -> None:
    assert printed(POOLINGS).splitlines()[-1] == "loaded: []"
