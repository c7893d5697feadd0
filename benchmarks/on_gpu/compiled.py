"""Time compiled steps: all cases compile in parallel, then each is timed alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from benchmarks.model_cases import Case
from benchmarks.model_rounds import Begun, process_of
from benchmarks.on_gpu.stages import Figures, Setting, Tasks
from benchmarks.on_gpu.steps import batch_sizes, case_of, figures_of, name_of


def cases_of(setting: Setting) -> list[Case]:
    """List the compiled cases; other stages compile the first one too."""
    if setting.tiny:
        # Of a DeiT of one block a compiler has a quarter of So-ViT's kernels to make.
        return [case_of(setting, "timm", "compile", batch_size=batch_sizes(setting)[0])]
    ours = [
        case_of(setting, "ours", "compile", batch_size=size)
        for size in batch_sizes(setting)
    ]
    largest = ours[0].batch_size
    return [ours[0], case_of(setting, "timm", "compile", batch_size=largest), *ours[1:]]


def tasks(setting: Setting) -> Tasks:
    """Time ours and timm's, with the compile time of each."""
    cases = cases_of(setting)
    together = Together(cases, round_s=setting.round_s)
    measure = functools.partial(together.measure, num_rounds=setting.num_rounds)
    return {name_of(case): functools.partial(measure, case) for case in cases}


class Together:
    """Processes that compile in parallel, which takes a minute or more each."""

    def __init__(self, cases: list[Case], *, round_s: float) -> None:
        self._processes = {case: process_of(case, round_s) for case in cases}

    @functools.cached_property
    def begun(self) -> dict[Case, Future[tuple[Begun, Callable[[], Any]]]]:
        """Future of each case's first results, with the function that asks for more.

        Starts them all.
        """
        pool = ThreadPoolExecutor(len(self._processes))
        return {case: pool.submit(self._begin, case) for case in self._processes}

    def _begin(self, case: Case) -> tuple[Begun, Callable[[], Any]]:
        ask = self._processes[case].__enter__()
        ask()  # it has imported all it needs
        return ask(), ask

    def measure(self, case: Case, *, num_rounds: int) -> Figures:
        """Time rounds of a case, once all have compiled; then its process ends."""
        for begun in self.begun.values():
            begun.exception()  # waits; whose it is raises it
        try:
            begun, ask = self.begun[case].result()
            rounds = [ask() for _ in range(num_rounds)]
        finally:
            self._processes[case].__exit__(None, None, None)
        return figures_of(case, begun=begun, rounds=rounds)
