"""Run all or the named cases on the fake GPU: `python -m tests.fake_gpu`.

Prints a line of JSON for each: what was seen, or why it did not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from typing import Any

from tests.fake_gpu.cases import CASES, COMPILED
from tests.fake_gpu.device import on_fake_gpu
from tests.fake_gpu.watch import Watch


def _done(name: str) -> dict[str, Any]:
    start_s = time.process_time()
    error, found = "", None
    is_fake = name in CASES
    with on_fake_gpu() if is_fake else contextlib.nullcontext(Watch()) as watch:
        try:
            found = (CASES if is_fake else COMPILED)[name](watch)
        except Exception:
            error = traceback.format_exc(limit=-12)
    return {
        "case": name,
        "seen": [dataclasses.asdict(one) for one in watch.seen],
        "num_ops": watch.num_ops,
        "found": found,
        "error": error,
        "cpu_s": time.process_time() - start_s,
    }


def main() -> None:
    """Run the named cases, or all."""
    for name in sys.argv[1:] or (*CASES, *COMPILED):
        print(json.dumps(_done(name)), flush=True)


if __name__ == "__main__":
    main()
