"""Wait for what other processes and threads do."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(
    condition: Callable[[], bool],
    *,
    what: str,
    seconds: float = 600,
    every_s: float = 0.05,
    log: Callable[[], str] = lambda: "",
) -> None:
    """Wait until a condition holds; on a timeout, fail with a log."""
    deadline_s = time.monotonic() + seconds
    while not condition():
        late = time.monotonic() > deadline_s
        assert not late, f"waited {seconds} s for {what}\n{log()[-3000:]}"
        time.sleep(every_s)
