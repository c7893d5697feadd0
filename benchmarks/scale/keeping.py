"""Time what is told, kept and written: the board, MLflow, checkpoints."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils.model_ema import ModelEmaV3

from benchmarks.scale.model import Kept
from pipelines import checkpoint as ckpt
from pipelines import tracking
from pipelines.config import Run
from pipelines.loop import TrainState
from pipelines.optim import build_optimizer
from pipelines.recipe import load_recipe
from pipelines.snapshot import Snapshot, take_snapshot, write_snapshot
from pipelines.telling.board import Board, Item, Measured, heard, wait_until_heard

_METRICS = {
    f"train/{name}": 0.5
    for name in ("loss", "top1", "top5", "images_per_s", "waiting_share", "lr", "bad")
}
# Those of a driver and its workers on Ray; a test holds them equal.
LISTEN_EVERY_S = 0.5
ASK_EVERY_S = 0.1
_MLFLOW_CLOSE_S = 120.0
# A copy is short, and what disturbs it is not: the least of many.
_COPIES_PER_ROUND = 8
_CLASSES = tuple(f"class {number}" for number in range(1000))


@dataclass(frozen=True, kw_only=True)
class BoardCost:
    """Hold what the driver's board takes, as a plain object."""

    post_us: float
    """To post a message and to take it."""
    heard_s: float
    """From a message until the driver has heard it, as a worker that asks sees it."""


def message(step: int) -> Item:
    """Make what rank 0 posts when metrics are due."""
    return Measured(step=step, metrics=_METRICS)


def measure_board(*, num_messages: int, num_rounds: int) -> BoardCost:
    """Post messages and take them; then wait to be heard, as before a report.

    Gives the least CPU time of all rounds for a message, and the median of the waits.
    """
    board = Board()
    post_us = min(
        1e6 * _post_and_take_cpu_s(board, num_messages=num_messages) / num_messages
        for _ in range(num_rounds)
    )
    with heard(
        board,
        hear=lambda item: None,
        is_over=threading.Event(),
        every_s=LISTEN_EVERY_S,
    ):
        heard_s = statistics.median(_wait_s(board) for _ in range(num_rounds))
    return BoardCost(post_us=post_us, heard_s=heard_s)


def _post_and_take_cpu_s(board: Board, *, num_messages: int) -> float:
    start_s = time.process_time()
    for step in range(num_messages):
        board.post(message(step))
    num_taken = len(board.take())
    seconds = time.process_time() - start_s
    assert num_taken == num_messages
    return seconds


def _wait_s(board: Board) -> float:
    """Post, and ask until the driver has heard it."""
    board.post(message(0))
    start_s = time.perf_counter()
    wait_until_heard(board.is_heard, every_s=ASK_EVERY_S)
    return time.perf_counter() - start_s


def measure_mlflow(folder: Path, *, num_logs: int) -> float:
    """Write metrics to MLflow on SQLite; give the points a second that it takes.

    Raises ValueError where some do not arrive.
    """
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    run_id = tracking.open_run(
        uri, experiment="scale", name="scale", params={}, tags={}
    )
    writer = tracking.MetricWriter(uri, run_id)
    start_s = time.perf_counter()
    for step in range(num_logs):
        writer.log(_METRICS, step=step)
    num_lost = writer.close(_MLFLOW_CLOSE_S)
    seconds = time.perf_counter() - start_s
    if num_lost or not run_id:
        raise ValueError(f"wanted MLflow to take all points, came {num_lost} lost")
    return num_logs * len(_METRICS) / seconds


def measure_checkpoint(recipe: str, *, folder: Path, num_rounds: int) -> Kept:
    """Copy a recipe's state with its average and optimiser, write it and restore it.

    Gives the least times of all rounds, on one thread. Copies go into fresh memory;
    what is read comes from the page cache.
    """
    run = load_recipe(recipe)
    model = ckpt.build_model(run.model, num_classes=len(_CLASSES))
    state = TrainState(
        model=model,
        forward=model,
        optimizer=build_optimizer(model, optim=run.optim),
        ema=ModelEmaV3(model, decay=run.optim.ema_decay),
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # its moments are there from the first step on
    with _one_thread():
        copies = range(_COPIES_PER_ROUND * num_rounds)
        copy_s = min(_copy(state, run=run)[0] for _ in copies)
        rounds = [_keep(state, run=run, folder=folder) for _ in range(num_rounds)]
    write_s, crc_s, load_s, num_bytes = (
        min(values) for values in zip(*rounds, strict=True)
    )
    return Kept(
        model=run.model.name,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        num_mb=num_bytes / 1e6,
        copy_s=copy_s,
        write_s=write_s,
        crc_s=crc_s,
        load_s=load_s,
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute on one: several wait for each other where cores are busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _give_back_memory() -> None:
    """Give free memory back to the system, where the C library can: glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _copy(state: TrainState, *, run: Run) -> tuple[float, Snapshot]:
    """Give the seconds to take a snapshot, and the snapshot."""
    assert state.ema is not None
    _give_back_memory()
    start_s = time.perf_counter()
    snapshot = take_snapshot(
        run=run,
        position=state.position,
        classes=_CLASSES,
        metrics={},
        model=state.model,
        ema=state.ema.module,
        optimizer=state.optimizer,
    )
    return time.perf_counter() - start_s, snapshot


def _keep(
    state: TrainState, *, run: Run, folder: Path
) -> tuple[float, float, float, float]:
    """Give the seconds to write, to check and to load, and the bytes."""
    assert state.ema is not None
    _, snapshot = _copy(state, run=run)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        start_s = time.perf_counter()
        write_snapshot(place, snapshot)
        written_s = time.perf_counter()
        manifest = ckpt.read_manifest(place)
        checked_s = time.perf_counter()
        ckpt.load_weights(state.model, place)
        ckpt.load_weights(state.ema.module, place, ema=True)
        ckpt.load_optimizer(state.optimizer, place)
        loaded_s = time.perf_counter()
    num_bytes = sum(file["num_bytes"] for file in manifest.files.values())
    return written_s - start_s, checked_s - written_s, loaded_s - checked_s, num_bytes
