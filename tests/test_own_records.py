"""A run or a sweep is one's own only where its record says so, and one process's."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray.train import UserCallback

from pipelines import tracking
from pipelines.checkpoints.run_record import (
    find_record,
    new_record,
    read_record,
    write_record,
)
from pipelines.config import Run, Validation
from pipelines.config.serialization import to_json
from pipelines.driver.fit import fit
from pipelines.storage import lease
from pipelines.storage.lease import OWNER_FILE, claimed
from pipelines.storage.path import StoragePath
from tests.demo_runs import RECIPE
from tests.fault_runs import brief_run
from tests.mlflow_stores import prepare_store
from tests.waiting import wait_for
from tuning import sweep as sweep_module
from tuning.checks import check_sweep_name
from tuning.search import _main as tune
from tuning.trials.ledger import Ledger, Sweep, TrialRecord, read_sweep
from tuning.trials.options import Search
from tuning.trials.trial import Trainer, TrialContext

NUM_AT_ONCE = 6
BUSY = r"expected a name that nobody works on, got 'a'.*process \d+ on .*--name"


def test_a_folder_is_one_processs_at_a_time_and_left_as_it_was(tmp_path: Path) -> None:
    folder = StoragePath(str(tmp_path / "runs/a"))
    with claimed(folder):
        with pytest.raises(ValueError, match=BUSY) as caught, claimed(folder):
            pass
        assert f"(process {os.getpid()} on " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with claimed(folder):
        folder.within("run.json").write(b"{}")
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["run.json"]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    code = "import sys, time; from pipelines.storage.path import StoragePath\n"
    code += "from pipelines.storage.lease import claimed\n"
    code += "with claimed(StoragePath(sys.argv[1])):\n"
    code += " print('held', flush=True)\n"
    code += " time.sleep(99)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on"):
        claimed(StoragePath(str(folder))).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / OWNER_FILE).exists()
    with claimed(StoragePath(str(folder))):
        pass


def _claim_once(folder: str, barrier: Any, won: Any) -> None:
    barrier.wait()
    with contextlib.suppress(ValueError), claimed(StoragePath(folder)):
        with won.get_lock():
            won.value += 1
        barrier.wait()
        return
    barrier.wait()


def test_of_several_at_once_one_has_it(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        barrier, won = fork.Barrier(NUM_AT_ONCE), fork.Value("i", 0)
        arguments = (str(tmp_path / f"{attempt}/a"), barrier, won)
        processes = [
            fork.Process(target=_claim_once, args=arguments) for _ in range(NUM_AT_ONCE)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert won.value == 1


@pytest.fixture
def bucket(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> StoragePath:
    """Give a run's folder in a store without locks, where waits are short."""
    monkeypatch.setattr(lease, "_BEAT_S", 0.02)
    monkeypatch.setattr(lease, "_SETTLE_S", 0.01)
    monkeypatch.setattr(lease, "_WATCH_S", 0.2)
    return StoragePath(f"memory://{request.node.name}/runs/a")


def _other(**fields: Any) -> lease.Owner:
    return dataclasses.replace(lease._this_process(), token="other", **fields)


def test_in_a_bucket_who_lives_is_seen_by_what_it_writes(
    bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claimed(bucket):
        before = lease._read(bucket)
        wait_for(lambda: lease._read(bucket) != before, what="a beat")
        # As from another machine, whose processes can't be looked at.
        with monkeypatch.context() as there:
            there.setattr(lease, "_machine", lambda: "another")
            there.setattr(lease, "_start_of", lambda pid: "there it is another")
            with pytest.raises(ValueError, match=BUSY), claimed(bucket):
                pass
    assert lease._read(bucket) is None
    lease._write(bucket, owner=_other(machine="gone"))
    with claimed(bucket):
        assert lease._read(bucket) != _other(machine="gone")


def test_in_a_bucket_a_process_of_this_machine_is_looked_at(
    bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_WATCH_S", 1e6)
    lease._write(bucket, owner=_other())
    with pytest.raises(ValueError, match=BUSY), claimed(bucket):
        pass
    lease._write(bucket, owner=_other(start="1"))  # its id was used again
    with claimed(bucket):
        pass


def test_of_two_in_a_bucket_at_once_the_last_to_write_has_it(
    bucket: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = lease._write

    def overwritten(folder: StoragePath, *, owner: lease.Owner) -> None:
        write(folder, owner=owner)
        write(folder, owner=_other())

    monkeypatch.setattr(lease, "_write", overwritten)
    with pytest.raises(ValueError, match=BUSY), claimed(bucket):
        pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Make the run that all tests take, and its store."""
    run = brief_run(tmp_path_factory.mktemp("own"), num_epochs=1)
    prepare_store(run.storage)
    return run


class _Meet(UserCallback):
    """Wait with a report until a test has looked."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Tell the test, and wait for it."""
        self.has_begun.set()
        self.may_end.wait(60)


def test_a_run_and_a_sweep_of_a_name_that_is_worked_on_are_refused(
    base: Run, tmp_path: Path
) -> None:
    """A second run, one that goes on with it, and a sweep."""
    meet = _Meet()
    settings: Any = {"name": "a", "callbacks": [meet], "keep_model": False}
    thread = threading.Thread(target=fit, args=(base,), kwargs=settings)
    thread.start()
    try:
        assert meet.has_begun.wait(60)
        with pytest.raises(ValueError, match="already holds"):
            fit(base, name="a")
        record = read_record(base.storage, name="a")
        with pytest.raises(ValueError, match=BUSY):
            fit(base, name="a", record=record)
    finally:
        meet.may_end.set()
        thread.join()
    assert not Path(base.storage, "a", OWNER_FILE).exists()

    searched = dataclasses.replace(base, validation=Validation())
    (tmp_path / "run.json").write_text(to_json(searched))
    (tmp_path / "recipe.py").write_text(RECIPE)
    arguments = [f"{tmp_path}/recipe.py:small", "pooling", "--name", "s"]
    with claimed(StoragePath(base.storage).within("s")):
        with pytest.raises(ValueError, match=r"nobody works on, got 's'.*process \d+"):
            tune([*arguments, "--scheduler", "none"])
        assert find_record(base.storage, name="s") is None
    assert not Path(base.storage, "s").exists()


def _sweep(run: Run, **fields: Any) -> Sweep:
    return Sweep(
        name="s",
        recipe="demo",
        run=run,
        space="pooling",
        domains={},
        search=Search(),
        **fields,
    )


def test_a_sweep_takes_no_trials_of_another(
    base: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before it begins, nor at a trial that came meanwhile, nor at its end."""
    run = dataclasses.replace(base, storage=str(tmp_path))
    check_sweep_name(run.storage, name="s")
    for name in ("s-0000", "s-x", "s-1", "t-0000"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"holds 1 trials of another.*\(s-0000\)"):
        check_sweep_name(run.storage, name="s")
    (tmp_path / "s-0000").rmdir()

    new_record(run, name="s-0000", sweep_id="theirs")
    known = TrialContext(
        sweep="s",
        sweep_id="ours",
        run=to_json(run),
        metrics=(),
        parent_id="",
        tracking_uri="",
        is_own_ray=True,
        is_local=True,
        node_id="",
        told={},
    )
    with pytest.raises(ValueError, match=r"no run 's-0000'.*or one of this sweep"):
        Trainer().train(known, name="s-0000", setting={}, callback=UserCallback())

    ledger, tagged = Ledger(_sweep(run, id="ours"), stage="full"), []
    monkeypatch.setattr(
        tracking, "tag_run", lambda *arguments, **tags: tagged.append(arguments)
    )
    entry = ledger.put(TrialRecord(number=0, setting={}, status="refused"))
    sweep_module._end(entry, ledger=ledger, uri="")
    assert tagged == []
    theirs = Ledger(_sweep(run, id="theirs"), stage="full")
    sweep_module._end(entry, ledger=theirs, uri="")
    assert len(tagged) == 1


def test_ids_are_kept(base: Run, tmp_path: Path) -> None:
    run = dataclasses.replace(base, storage=str(tmp_path))
    ids = {new_record(run, name=name).id for name in ("a", "b")}
    assert len(ids) == 2
    assert {read_record(run.storage, name=name).id for name in ("a", "b")} == ids
    from tuning.trials.ledger import write_sweep

    write_sweep(_sweep(run, id="c"))
    assert read_sweep(run.storage, name="s").id == "c"


def test_a_finished_run_of_another_record_is_left_alone_in_mlflow(base: Run) -> None:
    """Its folder was deleted and its name is used again, in the same place."""
    uri = tracking.default_uri(base.storage)

    def opened(id: str, **settings: Any) -> str:
        return tracking.open_run(
            uri,
            experiment="sovit",
            name="again",
            params={},
            tags={},
            place="runs/again",
            id=id,
            **settings,
        )

    first = opened("1" * 32)
    tracking.end_run(uri, first, status="FINISHED")
    second = opened("2" * 32, is_begun=True)
    assert second != first
    assert opened("2" * 32, is_begun=True) == second, "the id was never noted"
    assert opened("2" * 32, is_begun=True, run_id=first) not in (first, second)
    run = MlflowClient(uri).get_run(first)
    assert (run.info.status, run.data.tags.get("num_restarts")) == ("FINISHED", None)
    assert run.data.tags["sovit.id"] == "1" * 32


def test_a_renamed_run_goes_on_and_a_copy_does_not(base: Run, tmp_path: Path) -> None:
    run = dataclasses.replace(base, storage=str(tmp_path))
    record = new_record(run, name="a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match=r"got 'b', a copy of 'a'.*--resume a"):
        read_record(run.storage, name="b")
    shutil.rmtree(tmp_path / "a")
    renamed = read_record(run.storage, name="b")
    assert renamed == dataclasses.replace(record, name="b")
    write_record(renamed)
    assert not (tmp_path / "a").exists()
