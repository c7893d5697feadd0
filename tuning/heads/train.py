"""Train a model's head alone, on its backbone's precomputed tokens: no Ray.

Everything before `forward_head` is left out: neither built in memory for long nor
computed. So a setting of the pooling costs seconds where a training costs hours.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.config import Optim, Run, Schedule
from pipelines.errors import NonFiniteLossError
from pipelines.hardware.device import find_device, forked_rng, upload
from pipelines.training.metrics import MetricSums, smooth_targets, soft_cross_entropy
from pipelines.training.model import build_model
from pipelines.training.optimizer import (
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from pipelines.training.step import autocast
from tuning.heads.backbone import feature_shape, without_weights
from tuning.heads.feature_set import TokenReader, TokenSet

_EVAL_BATCH_SIZE = 1024


def train_head(
    run: Run,
    *,
    tokens: TokenSet,
    val: TokenSet,
    num_epochs: int,
    seed: int,
    on_epoch: Callable[[dict[str, float]], None] = lambda metrics: None,
    on_end: Callable[[nn.Module], None] = lambda model: None,
    lr: float | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """Train a fresh head of the run's model on tokens; evaluate after every epoch.

    The run gives the model with its pooling, the optimiser with its weight decay, and
    label smoothing. The rate falls as a cosine over the head's epochs; mixing and the
    moving average are left out, and so is the mirror image of an evaluation. A seed
    gives the same outcome again on the same machine.

    Args:
        on_epoch: Called with the metrics of each epoch.
        on_end: Called with the model, of which only the head is in memory.
        lr: Peak learning rate; None takes the run's.
        batch_size: Largest number of images per step.

    Returns:
        Metrics of the last epoch: `head/train_loss`, and of all held-out images
        `head/loss`, `head/top1`, `head/top5`; `head/images_per_s` and `epoch`.

    Raises ValueError where the model can't take such tokens, or the two sets are not of
    one kind, and NonFiniteLossError, naming the epoch, where the loss is not finite.
    """
    _check(tokens, val=val, num_epochs=num_epochs)
    device = find_device("auto" if run.scale.use_gpu else "cpu")
    # The caller's random numbers stay what they are.
    with forked_rng(device):
        torch.manual_seed(seed)
        trainer = _Trainer(
            run,
            tokens=tokens,
            val=val,
            optim=_optim(run.optim, lr=lr, num_epochs=num_epochs),
            batch_size=batch_size,
            seed=seed,
            device=device,
        )
        metrics: dict[str, float] = {}
        for epoch in range(num_epochs):
            metrics = trainer.epoch(epoch)
            on_epoch(metrics)
        on_end(trainer.head)
    return metrics


class _Trainer:
    """A head with its optimiser and batches during its training."""

    def __init__(
        self,
        run: Run,
        *,
        tokens: TokenSet,
        val: TokenSet,
        optim: Optim,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._optim, self._seed, self._device = optim, seed, device
        self._num_classes = len(tokens.classes)
        # Batches of like size: a last one of a few images would shake the averages.
        self._num_batches = math.ceil(tokens.num_images / batch_size)
        self._batch_size = math.ceil(tokens.num_images / self._num_batches)
        self._num_images = tokens.num_images
        self._tokens, self._val = TokenReader(tokens), TokenReader(val)
        self.head: Any = build_head(
            run, num_classes=self._num_classes, shape=tokens.shape, device=device
        )
        self._optimizer = build_optimizer(self.head, optim=optim)
        self._amp = run.scale.amp
        self._step = 0

    def epoch(self, epoch: int) -> dict[str, float]:
        """Train an epoch and evaluate; raise where a loss is not finite."""
        start_s = time.perf_counter()
        try:
            trained = self._train(epoch)
            seconds = time.perf_counter() - start_s
            held_out = self._evaluate()
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            # An exact decomposition refuses numbers that are not finite.
            raise NonFiniteLossError(
                f"expected finite matrices, got others in epoch {epoch + 1} of a head "
                f"({str(error)[:120]}); choose another --model.pooling.normalizer"
            ) from error
        for name, loss in (("training", trained), ("held-out", held_out["loss"])):
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"expected a finite loss, got a {name} loss of {loss} in epoch "
                    f"{epoch + 1} of a head; lower its lr, {self._optim.lr:g}"
                )
        return {
            "epoch": float(epoch + 1),
            "head/train_loss": trained,
            "head/loss": held_out["loss"],
            "head/top1": held_out["top1"],
            "head/top5": held_out["top5"],
            "head/images_per_s": self._num_images / seconds,
        }

    def _train(self, epoch: int) -> float:
        sums = MetricSums(self._device)
        self.head.train()
        batches = self._tokens.epoch(
            epoch, batch_size=self._batch_size, seed=self._seed
        )
        for tokens, labels in batches:
            lr = learning_rate(
                self._step, optim=self._optim, steps_per_epoch=self._num_batches
            )
            set_learning_rate(self._optimizer, lr=lr)
            labels = upload(labels, self._device)
            targets = smooth_targets(
                labels,
                num_classes=self._num_classes,
                smoothing=self._optim.label_smoothing,
            )
            logits = self._logits(tokens)
            losses = soft_cross_entropy(logits, targets)
            losses.mean().backward()
            if self._optim.clip_grad_norm:
                nn.utils.clip_grad_norm_(
                    self.head.parameters(), self._optim.clip_grad_norm
                )
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._step += 1
            sums.add(logits, labels, torch.ones_like(losses), losses)
        return sums.total()["loss"]

    @torch.inference_mode()
    def _evaluate(self) -> dict[str, float]:
        sums = MetricSums(self._device)
        self.head.eval()
        batches = self._val.epoch(0, batch_size=_EVAL_BATCH_SIZE, shuffle=False)
        for tokens, labels in batches:
            labels = upload(labels, self._device)
            logits = self._logits(tokens)
            losses = nn.functional.cross_entropy(
                logits.float(), labels, reduction="none"
            )
            sums.add(logits, labels, torch.ones_like(losses), losses)
        return sums.total()

    def _logits(self, tokens: Tensor) -> Tensor:
        with autocast(self._device, amp=self._amp):
            return self.head.forward_head(upload(tokens, self._device).float())


def build_head(
    run: Run, *, num_classes: int, shape: tuple[int, ...], device: torch.device
) -> nn.Module:
    """Build the run's model with fresh weights, of which only the head is in memory.

    Raises ValueError where its head does not take tokens of this shape.
    """
    model: Any = build_model(without_weights(run.model), num_classes=num_classes)
    wanted = feature_shape(model, img_size=run.model.img_size)
    if wanted != shape:
        raise ValueError(
            f"expected tokens of {wanted}, which {run.model.name} takes, got {shape}; "
            "set --model.name, --model.img-size and --model.kwargs as the backbone has "
            "them"
        )
    model.to(device).train()  # some weights count in training alone
    params = dict(model.named_parameters())
    trained = [name for name, param in params.items() if param.requires_grad]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad(), forked_rng(device):
        out = model.forward_head(torch.zeros(2, *shape, device=device))
        grads = torch.autograd.grad(
            out.sum(), [params[name] for name in trained], allow_unused=True
        )
    for name, grad in zip(trained, grads, strict=True):
        if grad is None:
            _forget(model, name)
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return model.eval()


def _forget(model: nn.Module, name: str) -> None:
    """Free a parameter's memory, and exclude it from training."""
    above, _, own = name.rpartition(".")
    empty = torch.empty_like(model.get_parameter(name), device="meta")
    setattr(model.get_submodule(above), own, nn.Parameter(empty, requires_grad=False))


def _check(tokens: TokenSet, *, val: TokenSet, num_epochs: int) -> None:
    if num_epochs < 1:
        raise ValueError(f"num_epochs: expected at least 1, got {num_epochs}")
    for name in ("classes", "shape"):
        if getattr(tokens, name) != getattr(val, name):
            raise ValueError(
                f"expected two token sets of the same {name}, got {tokens.place} and "
                f"{val.place} with others; write both with one call of write_tokens"
            )


def _optim(optim: Optim, *, lr: float | None, num_epochs: int) -> Optim:
    """Return the run's optimiser settings with a cosine over the head's epochs."""
    return dataclasses.replace(
        optim,
        lr=optim.lr if lr is None else lr,
        num_epochs=num_epochs,
        warmup_epochs=0,
        cooldown_epochs=0,
        min_lr=0.0,
        schedule=Schedule(),
    )
