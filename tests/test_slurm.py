"""A job of clusters/slurm.sh goes on when its time is over, on a SLURM of its own."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.checkpoints.run_record import find_record
from pipelines.config import Run
from pipelines.config.serialization import to_json
from tests.demo_runs import RECIPE
from tests.fault_runs import brief_run
from tests.mlflow_stores import prepare_store
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# In a process namespace of its own: `ray stop` ends every Ray that it sees.
_START = (
    "munged --key-file={0}/key --socket={0}/munge --pid-file={0}/munge.pid "
    "--log-file={0}/munge.log --seed-file={0}/seed --force && "
    "slurmctld -f {0}/slurm.conf && exec slurmd -D -f {0}/slurm.conf"
)


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def settings_of(folder: Path) -> dict[str, object]:
    host = socket.gethostname().partition(".")[0]
    return {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": "root",
        "SlurmctldPort": closed_port(),
        "SlurmdPort": closed_port(),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SlurmctldPidFile": folder / "ctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmdSpoolDir": folder / "spool",
        "StateSaveLocation": folder / "state",
        "SlurmctldLogFile": folder / "ctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "KillWait": 5,
        "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000",
        "PartitionName": "main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    }


@pytest.fixture
def slurm() -> Iterator[Path]:
    """Start a SLURM of one node, this machine; its folder's path is short."""
    if os.geteuid() != 0 or not all(shutil.which(p, path=_PATH) for p in _PROGRAMS):
        pytest.skip("needs root and Debian's slurm-wlm")
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as name:
        folder = Path(name)
        for sub in ("spool", "state", "ray"):
            (folder / sub).mkdir()
        (folder / "key").write_bytes(os.urandom(64))
        (folder / "key").chmod(0o600)
        lines = [f"{key}={value}\n" for key, value in settings_of(folder).items()]
        (folder / "slurm.conf").write_text("".join(lines))
        namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        process = subprocess.Popen(
            [*namespace, "bash", "-c", _START.format(folder)],
            env={**os.environ, "PATH": _PATH},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(
                lambda: "idle" in asked(folder, "sinfo", "-h"),
                what="a node that waits for jobs",
                every_s=0.5,
            )
            yield folder
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def asked(folder: Path, *command: str, **settings: str) -> str:
    """Run a command of SLURM; return what it said."""
    environment = {
        **os.environ,
        "PATH": _PATH,
        "SLURM_CONF": str(folder / "slurm.conf"),
        **settings,
    }
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    ).stdout


def submitted(run: Run, *, folder: Path, slurm: Path) -> str:
    """Submit a run, as its user would; return the job's id."""
    (folder / "run.json").write_text(to_json(run))
    (folder / "recipe.py").write_text(RECIPE)
    sizes = ["--nodes=1", "--gpus-per-node=0", f"--cpus-per-task={os.cpu_count()}"]
    return asked(
        slurm,
        *("sbatch", "--parsable", *sizes, f"--output={folder}/log"),
        *(f"{ROOT}/clusters/slurm.sh", f"{folder}/recipe.py:small", "--name", "ours"),
        SOVIT_BIN=str(Path(sys.executable).parent),
        SOVIT_PORT=str(closed_port()),
        RAY_TMPDIR=str(slurm / "ray"),
    ).strip()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_whose_time_is_over_is_queued_again_and_goes_on(
    slurm: Path, tmp_path: Path
) -> None:
    run = brief_run(tmp_path, num_epochs=12)
    run = dataclasses.replace(
        run, scale=dataclasses.replace(run.scale, num_workers=1), log_every_steps=2
    )
    prepare_store(run.storage)
    job = submitted(run, folder=tmp_path, slurm=slurm)
    log = tmp_path / "log"

    def said(text: str) -> bool:
        return log.exists() and text in log.read_text()

    def wait_until_said(text: str) -> None:
        wait_for(
            lambda: said(text) or has_ended(),
            what=text,
            every_s=0.5,
            log=lambda: (log.read_text() if log.exists() else "") + state(),
        )
        assert said(text), log.read_text()

    def state() -> str:
        return asked(slurm, "scontrol", "show", "job", job)

    def has_ended() -> bool:
        return any(f"JobState={end}" in state() for end in ("COMPLETED", "FAILED"))

    wait_until_said("epoch 2/")
    asked(
        slurm, "scancel", "--batch", "--signal=TERM", job
    )  # as its time is nearly over
    wait_until_said(f"job {job} goes back into the queue, run ours")
    assert "ended by SIGTERM after a checkpoint" in log.read_text()
    # SLURM waits two minutes before it starts a job again.
    wait_for(lambda: "PENDING" in state(), what="a job that waits", log=state)
    asked(slurm, "scontrol", "update", f"jobid={job}", "starttime=now")
    wait_for(
        has_ended,
        what="the end",
        every_s=1,
        log=log.read_text,
    )
    text = log.read_text()
    assert "ExitCode=0:0" in state(), text
    starts = [
        line.split("from step ")[1] for line in text.splitlines() if "from step" in line
    ]
    assert len(starts) == 2
    assert starts[0] == "0"
    assert int(starts[1]) > 0
    record = find_record(run.storage, name="ours")
    assert record is not None
    assert record.status == "finished"
