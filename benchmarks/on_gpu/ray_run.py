"""Train the demo on Ray with one worker, kill it, resume, and evaluate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.rates import device_of
from benchmarks.on_gpu.stages import Figures, Setting, Tasks
from pipelines.hardware.device import is_gpu
from recipes.demo import demo
from tests.demo_runs import part_of_demo
from tests.processes import descendants_named

_NAME = "on-gpu"
_WORKER = "RayTrainWorker"
_ROOT = Path(__file__).parents[2]
_LOOK_EVERY_S = 0.05
# As the tests have it: a worker that died is noticed at once, and not waited for.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
_ELSEWHERE = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")


def tasks(setting: Setting) -> Tasks:
    """Train with a worker that is killed, then evaluate the result."""
    return {
        "trained, killed, resumed": lambda: _train(setting),
        "evaluated": lambda: _evaluate(setting),
    }


def _train(setting: Setting) -> Figures:
    """Kill the worker with SIGKILL after its first epoch."""
    data, start_s = _data(setting), time.monotonic()
    on_gpu = is_gpu(device_of(setting))
    process = _start(
        "pipelines.train",
        *("demo", "--name", _NAME, "--storage", str(_runs(setting))),
        *("--data.train", data["train"], "--data.val", data["val"]),
        *("--optim.num-epochs", str(_num_epochs(setting)), "--scale.num-workers", "1"),
        *("--optim.warmup-epochs", "1", "--scale.min-workers", "1"),
        "--scale.use-gpu" if on_gpu else "--scale.no-use-gpu",
    )
    first, last = (_checkpoint(setting, number) for number in (1, _num_epochs(setting)))
    _wait_for(first, process)
    first_s = time.monotonic() - start_s
    workers = descendants_named(_WORKER)
    if len(workers) != 1:
        raise RuntimeError(f"expected one {_WORKER}, got {workers}")
    os.kill(workers[0], signal.SIGKILL)
    killed_s = time.monotonic()
    _wait_for(_checkpoint(setting, 2), process)
    again_s = time.monotonic() - killed_s
    if (code := process.wait()) or not last.exists():
        raise RuntimeError(f"expected a run that ends, its driver ended with {code}")
    return {
        "first_epoch_after_s": first_s,
        "next_epoch_after_kill_s": again_s,
        "seconds_in_all": time.monotonic() - start_s,
        "killed": workers[0],
    }


def _evaluate(setting: Setting) -> Figures:
    report = setting.work / "evaluation.json"
    checkpoint = _checkpoint(setting, _num_epochs(setting)).parent
    process = _start(
        "pipelines.evaluate",
        *(str(checkpoint), _data(setting)["val"], "--json", str(report)),
        *("--device", device_of(setting).type),
    )
    if code := process.wait():
        raise RuntimeError(f"sovit-eval ended with {code}")
    found: dict[str, Any] = json.loads(report.read_text())
    return {name: found[name] for name in ("top1", "top5", "loss") if name in found}


def _start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command of ours, with its output in the stage's log."""
    inherited = {k: v for k, v in os.environ.items() if k not in _ELSEWHERE}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=_ROOT,
        env={**inherited, **_ENVIRONMENT},
        stdin=subprocess.DEVNULL,
    )


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        if (code := process.poll()) is not None:
            raise RuntimeError(f"expected {path.parent.name}, its run ended: {code}")
        time.sleep(_LOOK_EVERY_S)


def _num_epochs(setting: Setting) -> int:
    return setting.pick(4, tiny=5)


def _runs(setting: Setting) -> Path:
    return setting.work / "runs"


def _checkpoint(setting: Setting, number: int) -> Path:
    return _runs(setting) / _NAME / f"epoch_{number:04d}" / "checkpoint.json"


def _data(setting: Setting) -> dict[str, str]:
    """Return the demo's sets, or in a tiny run some hundreds of their photographs."""
    data = demo().data
    if not setting.tiny:
        return {"train": data.train, "val": data.val}
    return {
        "train": _part(setting, "train", num_rows=600),
        "val": _part(setting, "val", num_rows=100),
    }


def _part(setting: Setting, split: str, *, num_rows: int) -> str:
    folder = setting.work / f"demo-{split}"
    if not folder.exists():
        part_of_demo(folder, split=split, num_rows=num_rows)
    return str(folder)
