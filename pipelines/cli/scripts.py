"""Console scripts: each imports its command, quiet on Ctrl-C meanwhile.

torch, Ray and timm take seconds to import, in which Python would answer Ctrl-C with a
traceback from somewhere within them.
"""

from __future__ import annotations

import importlib
import signal
from functools import partial


def _run(module: str) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if handler == signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = importlib.import_module(module)
    signal.signal(signal.SIGINT, handler)
    command.main()


shards = partial(_run, "pipelines.shards.command")
train = partial(_run, "pipelines.train")
evaluate = partial(_run, "pipelines.evaluate")
export = partial(_run, "pipelines.export.command")
predict = partial(_run, "pipelines.predict")
preview = partial(_run, "pipelines.preview")
scoreboard = partial(_run, "pipelines.results.scoreboard")
tune = partial(_run, "tuning.search")
probe = partial(_run, "tuning.probe")
compare = partial(_run, "pipelines.results.compare")
