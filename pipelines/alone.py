"""Train in the calling process: no Ray, no other process.

Everything but the group is what Ray's workers do: the same model, batches, checkpoints
and metrics. What fails ends the run, which `--resume` goes on with; nothing starts it
again by itself.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.fs as pafs
import torch
from ray.train import UserCallback

from pipelines.checkpoint import MANIFEST, opened, read_manifest, step_of
from pipelines.config import Data
from pipelines.errors import RunFailedError
from pipelines.failures import first_line
from pipelines.files import Place
from pipelines.ingest.reading import Reading
from pipelines.ingest.stream import LocalOpener, Opener
from pipelines.job import Job, Trained
from pipelines.retries import answering
from pipelines.telling.board import Board, Item, wait_until_heard
from pipelines.telling.listener import Listener
from pipelines.worker import Worker

logger = logging.getLogger(__name__)
# In one process that costs nothing, and a report waits for it.
_LISTEN_EVERY_S = 0.02


class Alone:
    """Be a worker's `Group` of one: keep its checkpoints, pass on its reports.

    Args:
        folder: Where the run's checkpoints lie.
        callbacks: As Ray Train calls them; there is no run context.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        job: Job,
        *,
        folder: Place,
        callbacks: Sequence[UserCallback],
        board: Board,
    ) -> None:
        self.device = torch.device("cuda" if job.run.scale.use_gpu else "cpu")
        self.metrics: Mapping[str, float] = {}
        self._num_to_keep = job.run.num_checkpoints_to_keep
        self._folder = folder
        self._callbacks = callbacks
        self._board = board
        self._kept = _checkpoints(folder)

    @property
    def checkpoint(self) -> Place | None:
        """Name the last checkpoint, if there is one."""
        return self._folder.within(self._kept[-1]) if self._kept else None

    def opener(self, reading: Reading, *, data: Data) -> Opener:
        """Give what reads in this process, as the batches are taken."""
        return LocalOpener(reading)

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        """Give the last checkpoint that was written whole."""
        if self.checkpoint is None:
            yield None
            return
        with opened(self.checkpoint) as folder:
            # Where nothing is left to train, this is what the run came to.
            self.metrics = read_manifest(folder).metrics
            yield folder

    def agreed(self, value: int) -> int:
        """Give the value back."""
        return value

    def report(
        self, metrics: Mapping[str, float], *, folder: Path | None, name: str
    ) -> None:
        """Keep a checkpoint, delete those before the last few, tell the callbacks."""
        self.metrics = metrics
        wait_until_heard(self._board.is_heard, every_s=_LISTEN_EVERY_S)
        if folder is not None:
            self._keep(folder, name=name)
        for callback in self._callbacks:
            callback.after_report(None, [dict(metrics)], None)  # pyright: ignore[reportArgumentType]

    def post(self, item: Item) -> None:
        """Post to this process's board."""
        self._board.post(item)

    def is_ending(self) -> bool:
        """Ask this process's board."""
        return self._board.is_ending()

    def close(self) -> None:
        """End nothing: nothing was started."""

    def _keep(self, folder: Path, *, name: str) -> None:
        place = self._folder.within(name)
        with answering():
            place.make_folder()
            # The manifest last: a checkpoint without it was cut off.
            for file in sorted(
                folder.iterdir(), key=lambda file: file.name == MANIFEST
            ):
                with place.within(file.name).writing() as partial:
                    shutil.copyfile(file, partial)
            self._kept = [kept for kept in self._kept if kept != name] + [name]
            while len(self._kept) > self._num_to_keep:
                self._folder.within(self._kept.pop(0)).delete_folder()


def _checkpoints(folder: Place) -> list[str]:
    """List the names of a run's whole checkpoints, the first one first."""
    with answering():
        names = [
            entry.base_name
            for entry in folder.entries()
            if entry.type == pafs.FileType.Directory
        ]
    steps = {name: step_of(folder.within(name)) for name in names}
    whole = {name: step for name, step in steps.items() if step is not None}
    return sorted(whole, key=lambda name: whole[name])


def train_alone(
    job: Job, *, name: str, callbacks: Sequence[UserCallback], listener: Listener
) -> Trained:
    """Train to the end of the run, and show what it reports.

    Raises ValueError for what the user can mend, and RunFailedError for all else.
    """
    if job.run.scale.use_gpu and not torch.cuda.is_available():
        raise ValueError(
            "wanted a GPU for --scale.use-gpu, came a machine where PyTorch finds "
            "none; set --scale.no-use-gpu, or look at nvidia-smi"
        )
    board = Board()
    num_threads = torch.get_num_threads()
    logger.info("training in this process")
    try:
        group = Alone(
            job,
            folder=Place(job.run.storage).within(name),
            callbacks=callbacks,
            board=board,
        )
        listening = listener.listening(board, every_s=_LISTEN_EVERY_S)
        with listening, Worker(job, group=group) as worker:
            worker.train()
    except ValueError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RunFailedError(reason) from error
    finally:
        torch.set_num_threads(num_threads)
    return Trained(metrics=group.metrics, checkpoint=group.checkpoint)
