"""Import what most stages need, once: their processes fork off one that has it.

That takes seconds for each otherwise. Nothing here touches a GPU, so each process can.
"""

from __future__ import annotations

import contextlib
import importlib

for _name in ("torch", "timm", "pyarrow", "benchmarks.model_rounds"):
    with contextlib.suppress(Exception):  # the stages that need it say so
        importlib.import_module(_name)
