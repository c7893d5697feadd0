"""Send signals to short runs at random moments, and check what is left."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoints.run_record import find_record
from pipelines.config import Run
from pipelines.config.serialization import to_json
from tests.demo_runs import RECIPE
from tests.fault_runs import brief_run
from tests.lives import begin
from tests.mlflow_stores import prepare_store
from tests.waiting import wait_for

KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
CHECKPOINTED = 75
_END_S = 240
# Ray's agents, whose raylet is gone, try for a minute to tell a GCS that is gone too.
_ALONE_S = 150


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a signal is sent: a delay after the process's start or the run's record."""

    number: signal.Signals
    seconds: float
    is_recorded: bool
    """Whether the time counts from when the run's record is there."""


def moments(seed: int, *, num: int, longest_s: float) -> list[Moment]:
    """Draw moments, as many for each signal; two thirds of them near the start."""
    draw = random.Random(seed)
    return [
        Moment(
            number=KINDS[at % len(KINDS)],
            seconds=draw.uniform(0, longest_s / (4 if at % 3 else 1)),
            is_recorded=draw.random() < 0.8,
        )
        for at in range(num)
    ]


def signalled_run(folder: Path, *, num_workers: int = 0) -> Run:
    """Build a run of some seconds, with its recipe file beside."""
    run = brief_run(folder, num_epochs=3)
    scale = dataclasses.replace(run.scale, num_workers=num_workers)
    run = dataclasses.replace(run, scale=scale, log_every_steps=2)
    prepare_store(run.storage)
    (folder / "run.json").write_text(to_json(run))
    (folder / "recipe.py").write_text(RECIPE)
    return run


def begin_run(folder: Path, *, name: str, keeps_model: bool) -> BaseProcess:
    """Start or resume a run, by the same command."""
    arguments = [f"{folder}/recipe.py:small", "--resume", name]
    return begin(arguments, log=folder / f"{name}.log", keeps_model=keeps_model)


def send_at(
    moment: Moment, *, folder: Path, run: Run, name: str, keeps_model: bool
) -> int:
    """Start a run, send it a signal, and wait for its end; return its exit status."""
    process = begin_run(folder, name=name, keeps_model=keeps_model)
    assert process.pid is not None
    record = Path(run.storage, name, "run.json")
    if moment.is_recorded:
        wait_for(
            lambda: record.exists() or not process.is_alive(),
            what="the run's record",
            every_s=0.002,
        )
    time.sleep(moment.seconds)
    if process.is_alive():
        os.kill(process.pid, moment.number)
    return ended(process)


def ended(process: BaseProcess) -> int:
    """Wait for a command and all of its processes to end; return its exit status."""
    process.join(_END_S)
    assert process.exitcode is not None, "it does not end"
    assert process.pid is not None
    wait_until_alone(process.pid)
    return process.exitcode


def wait_until_alone(session: int) -> None:
    """Wait until no process of a session is left; fail if one stays."""
    deadline_s = time.monotonic() + _ALONE_S
    while left := _processes_of(session):
        assert time.monotonic() < deadline_s, [title.strip() for title in left]
        time.sleep(0.1)


def _processes_of(session: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) == session and stat[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def check_ended(moment: Moment, *, status: int, said: str, run: Run, name: str) -> str:
    """Check that MLflow, the record and the output agree; return how the run ended."""
    record = find_record(run.storage, name=name)
    tracked = _tracked(run, name=name)
    shown = f"{moment}: {status}\n{said[-2000:]}"
    assert "Traceback" not in said, shown
    if moment.number == signal.SIGKILL and status == -signal.SIGKILL:
        return "killed"
    if status == 0:
        assert record is not None, shown
        assert record.status == "finished", shown
        assert tracked == ["FINISHED"], shown
        return "finished"
    if record is None:
        assert tracked == [], shown
        # Python's own end where it came before the command began.
        wanted = {128 + moment.number, -moment.number}
        assert status in wanted, shown
        return "not begun"
    assert tracked == ["KILLED"], shown
    assert f"--resume {name}" in said, shown
    assert status in (CHECKPOINTED, 128 + moment.number), shown
    return "checkpointed" if status == CHECKPOINTED else "at once"


def finish(folder: Path, *, run: Run, name: str, keeps_model: bool) -> None:
    """Resume a run to its end, which is one run in MLflow."""
    record = find_record(run.storage, name=name)
    if record is None or record.status != "finished":
        process = begin_run(folder, name=name, keeps_model=keeps_model)
        assert ended(process) == 0, (folder / f"{name}.log").read_text()[-3000:]
    assert _tracked(run, name=name) == ["FINISHED"]


def _tracked(run: Run, *, name: str) -> list[str]:
    client = MlflowClient(tracking.default_uri(run.storage))
    experiment = client.get_experiment_by_name(run.experiment)
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id])
    return [found.info.status for found in runs if found.info.run_name == name]


def rehearse(
    folder: Path,
    drawn: Sequence[Moment],
    *,
    num_workers: int = 0,
    keeps_model: bool = True,
) -> Counter[str]:
    """Send a signal at each moment, each to its own run; count how they ended."""
    run = signalled_run(folder, num_workers=num_workers)
    ends: Counter[str] = Counter()
    for at, moment in enumerate(drawn):
        name = f"run-{at}"
        status = send_at(
            moment, folder=folder, run=run, name=name, keeps_model=keeps_model
        )
        said = (folder / f"{name}.log").read_text()
        end = check_ended(moment, status=status, said=said, run=run, name=name)
        since = "record" if moment.is_recorded else "start"
        print(f"{moment.number.name} {moment.seconds:.2f} s after its {since}: {end}")
        finish(folder, run=run, name=name, keeps_model=keeps_model)
        ends[f"{moment.number.name} {end}"] += 1
    return ends


def main() -> None:
    """Rehearse: `python -m tests.signalled FOLDER NUM NUM_WORKERS SEED LONGEST_S`."""
    folder, num, num_workers, seed, longest_s = sys.argv[1:]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ends = rehearse(
        Path(folder),
        moments(int(seed), num=int(num), longest_s=float(longest_s)),
        num_workers=int(num_workers),
    )
    print(dict(ends))


if __name__ == "__main__":
    main()
