"""The training loop of one worker: step, log, evaluate and write checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipelines.data.batch import Batch
from pipelines.errors import check_bad_share
from pipelines.evaluation.in_training import InTrainingEvaluator
from pipelines.events.channel import Figure, Message, Metrics, Progress
from pipelines.hardware.device import PeakMemory, is_gpu
from pipelines.training.metrics import MetricSums
from pipelines.training.optimizer import current_learning_rate
from pipelines.training.state import TrainState, share_buffers
from pipelines.training.step import TrainSettings, step_from, train_step
from pipelines.worker.audit_log import AuditLog
from pipelines.worker.checkpointing import Checkpointer
from pipelines.worker.early_stopping import EarlyStopping
from pipelines.worker.gradient_probe import Prober
from pipelines.worker.group import Group
from pipelines.worker.throughput import Throughput
from pipelines.worker.watchdog import Watchdog


@dataclass(kw_only=True)
class TrainingLoop:
    """Training loop over one worker's batches, to the end of the run.

    All workers loop alike: logging, evaluation and checkpoints are collectives, at the
    same step on each of them.
    """

    state: TrainState
    settings: TrainSettings
    batches: Iterable[Batch]
    """All batches left of the run, from the state's position on."""
    group: Group
    checkpointer: Checkpointer
    early_stopping: EarlyStopping
    evaluator: InTrainingEvaluator
    watchdog: Watchdog
    prober: Prober | None = None
    audit_log: AuditLog | None = None
    keeps_pictures: bool = True
    """Whether to log pictures of the model's errors to MLflow."""
    _last_log: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._memory = PeakMemory(self.settings.device)

    def train(self) -> None:
        """Train until the batches end, the driver asks to stop or nothing improves.

        Raises NonFiniteLossError, naming the step, or RewindError, where the loss is
        not finite, and BadImagesError where too many images could not be decoded.
        """
        run, state, settings = self.settings.run, self.state, self.settings
        sums, clock, num_bad = MetricSums(settings.device), Throughput(), 0
        batches = clock.waiting(self.watchdog.watching(self.batches, doing="training"))
        state.train_mode()
        # A worker may have died between the last evaluation and the run's end.
        if state.position.batch == 0 and self._is_over():
            return
        for batch in batches:
            self._probe(batch)
            micro_batches = self._audited(step_from(batch, batches))
            train_step(state, micro_batches, settings=settings, sums=sums)

            step, every = state.position.step, run.checkpoint_every_steps
            is_logged = step % run.log_every_steps == 0 or batch.ends_epoch
            is_due = every > 0 and step % every == 0
            is_last = False
            # To ask a GPU is to wait for it, so that it is asked only where a bad step
            # would be logged or kept. A CPU has done the step already.
            if is_logged or is_due or not is_gpu(settings.device):
                self._note(state.guard.check())

            if is_logged:
                votes = self._votes(clock)
                metrics = sums.total(votes=votes)
                is_last = metrics.pop("is_last") > 0
                is_due = metrics.pop("is_time") > 0 or is_due or is_last
                num_bad += round(metrics.pop("num_bad"))
                self._check_bad_share(num_bad)
                metrics |= clock.rates(metrics.pop("num_images"))
                lr = current_learning_rate(state.optimizer)
                self._log(metrics | {"lr": lr, "bad_images": num_bad}, batch=batch)

            if batch.ends_epoch:
                self._end_epoch()
                is_last = is_last or self._is_over()
                # Evaluation left the model in its own mode; bad images, the rate and
                # the time of the last checkpoint count anew from here.
                state.train_mode()
                clock.restart(kept=True)
                num_bad = 0
            elif is_due:
                with clock.pause():
                    self._save()
            if is_last:
                return

    def _probe(self, batch: Batch) -> None:
        if self.prober is not None and (metrics := self.prober(self.state, batch)):
            step = self.state.position.step
            self.group.post(Metrics(step=step, metrics=metrics))

    def _audited(self, micro_batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield micro-batches, and log each once it was trained on."""
        for batch in micro_batches:
            yield batch
            # Not before: what a step failed on, the weights have not seen.
            if self.audit_log is not None:
                self.audit_log(batch, self.state.position.step)

    def _votes(self, clock: Throughput) -> dict[str, bool]:
        """Vote on whether to write a checkpoint, and whether it is the last.

        Workers' clocks differ, and one may learn of the end before the others: one vote
        is enough for all.
        """
        # First, and on every worker: to ask for a notice is a collective.
        is_preempted = self.group.is_preempted()
        is_time = clock.is_time(self.settings.checkpoint_every_minutes)
        return {
            "is_time": is_preempted or is_time,
            "is_last": self.group.should_stop(),
        }

    def _check_bad_share(self, num_bad: int) -> None:
        check_bad_share(
            num_bad,
            num_images=self.settings.images_per_epoch,
            max_share=self.settings.run.data.max_bad_share,
        )

    def _note(self, line: str) -> None:
        if line:
            self.group.post(Message(line=line))

    def _log(self, metrics: Mapping[str, float], *, batch: Batch) -> None:
        """Post means since the last log, the same on all workers, from rank 0."""
        self._last_log = dict(metrics)
        self._memory.look()
        if self.group.rank == 0:
            # Of the epoch that the batch belongs to: the position may be past it.
            self._post_progress(epoch=batch.epoch)
            named = {f"train/{name}": value for name, value in metrics.items()}
            step = self.state.position.step
            self.group.post(Metrics(step=step, metrics=named))

    def _post_progress(
        self, *, epoch: int, held_out: Mapping[str, float] | None = None
    ) -> None:
        event = Progress(
            step=self.state.position.step,
            epoch=epoch,
            metrics=self._last_log,
            epoch_metrics=held_out,
        )
        self.group.post(event)

    def _end_epoch(self) -> None:
        """Evaluate if due, write a checkpoint and report."""
        state, position = self.state, self.state.position
        # Each worker's BatchNorm has seen its own images: evaluated and kept is one.
        share_buffers(state.model)
        if state.ema is not None:
            share_buffers(state.ema.module)
        metrics, held_out = self._evaluate()
        metrics |= {f"train/{k}": v for k, v in self._memory.metrics().items()}
        metrics["epoch"] = position.epoch
        if self.prober is not None:
            metrics |= self.prober.summary()
        if self.group.rank == 0:
            # Before the report, with which a sweep may end this run.
            self.group.post(Metrics(step=position.step, metrics=metrics))
            self._post_progress(epoch=position.epoch, held_out=held_out)
        name = f"epoch_{position.epoch:04d}"
        self._report(name=name, metrics=metrics, can_wait=True)
        if self.prober is not None:
            title = f"{self.settings.run.recipe}, to epoch {position.epoch}"
            path = f"probes/epoch_{position.epoch:04d}.png"
            self.group.post(Figure(draw=self.prober.figure(title), path=path))

    def _evaluate(self) -> tuple[dict[str, float], dict[str, float]]:
        """Evaluate if due; return all metrics, and those of the primary score."""
        run, epoch = self.settings.run, self.state.position.epoch
        num_epochs = run.optim.total_epochs
        is_due = run.validation.is_due(epoch, num_epochs=num_epochs)
        # Beside the training, the driver has the checkpoint evaluated.
        if not is_due or run.validation.asynchronous:
            return {}, {}
        metrics = self.evaluator(self.state)
        self.early_stopping.observe(metrics, epoch=epoch)
        held_out = self.evaluator.primary.values()
        if self.group.rank == 0 and self.keeps_pictures:
            title = f"{run.recipe}, epoch {epoch}"
            is_last = epoch == num_epochs
            pictures = self.evaluator.pictures(title=title, is_last=is_last)
            if pictures is not None:
                self.group.post(pictures)
        return metrics, held_out

    def _is_over(self) -> bool:
        """Check whether training has stopped improving, and say so from rank 0."""
        is_over = self.early_stopping.is_over(self.state.position.epoch)
        if is_over and self.group.rank == 0:
            self.group.post(Message(line=self.early_stopping.reason()))
        return is_over

    def _save(self) -> None:
        """Write a checkpoint within an epoch, without evaluation."""
        name = f"step_{self.state.position.step:08d}"
        # Asked to end, it is the last one.
        is_last = self.group.should_stop()
        self._report(name=name, metrics={}, can_wait=is_last)

    def _report(
        self, *, name: str, metrics: Mapping[str, float], can_wait: bool
    ) -> None:
        """Write a checkpoint with the latest metrics, and report them.

        A barrier of all workers: training waits here for a copy of the state.
        """
        metrics = {f"train/{k}": v for k, v in self._last_log.items()} | dict(metrics)
        # A store that is slow is not a worker that hangs.
        with self.watchdog.paused():
            self.checkpointer.keep(
                self.state, name=name, metrics=metrics, can_wait=can_wait
            )
            self.group.report(metrics)
