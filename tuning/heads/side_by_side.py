"""Train different heads on one backbone's tokens, beside its nearest neighbours."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import Run
from pipelines.errors import NonFiniteLossError
from pipelines.training.model import build_model, takes_pooling, without_weights
from sovit import Pooling
from tuning.heads.extract import TokenReader, TokenSet, TokenSets
from tuning.heads.train import train_head

KNN = "knn"
# DINO's; the number of neighbours is its best on ImageNet.
_KNN_T = 0.07
_KNN_ROWS = 1024
# By name: the pooling, and the fusion with a class token and without; None leaves it
# out where there is no class token.
HEADS: Mapping[str, tuple[Pooling, str, str | None]] = MappingProxyType(
    {
        "class": (Pooling.named("avg"), "class", None),
        "mean": (Pooling.named("avg"), "visual", "visual"),
        "class+mean": (Pooling.named("avg"), "sum", None),
        "cov": (Pooling.named("cov", reduced_dim=64), "sum", "visual"),
        "isqrt_cov": (Pooling.named("isqrt_cov", reduced_dim=64), "sum", "visual"),
        "drop_cov": (Pooling.named("drop_cov", reduced_dim=64), "sum", "visual"),
        "svpn": (Pooling.named("svpn"), "sum", "visual"),
        "multi_head_svpn": (Pooling.named("multi_head_svpn"), "sum", "visual"),
        "moment": (Pooling.named("moment"), "mean", "visual"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one head came to."""

    head: str
    top1: float = math.nan
    top5: float = math.nan
    num_params: int = 0
    seconds: float = 0.0
    lr: float = math.nan
    failure: str = ""


def changed(run: Run, **fields: Any) -> Run:
    """Return a run with other settings of its model."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **fields))


def with_head(run: Run, head: str, *, has_class: bool) -> Run | None:
    """Put a head on the backbone; None for one of a class token that is not there."""
    pooling, with_class, without = HEADS[head]
    fusion = with_class if has_class else without
    if fusion is None:
        return None
    kwargs = {**without_weights(run.model).kwargs, "fusion": fusion}
    if not takes_pooling(run.model.name):
        kwargs.setdefault("drop_last_stride", False)
    return changed(run, pooling=pooling, kwargs=kwargs)


def has_class_token(run: Run) -> bool:
    """Return whether the backbone's tokens begin with a class token."""
    mean = with_head(run, "mean", has_class=False)
    assert mean is not None
    model: Any = build_model(without_weights(mean.model), num_classes=1)
    features = getattr(model, "features", None)
    if features is None:
        return model.head.num_prefix_tokens > 0
    return features.has_class_token


def train_best(
    run: Run,
    *,
    head: str,
    tokens: TokenSets,
    num_epochs: int,
    rates: Sequence[float],
) -> tuple[Result, Mapping[str, Tensor]]:
    """Train a head at each rate; return the best one and its tensors."""
    best = Result(head=head, failure="no rate gave a finite loss")
    best_state: Mapping[str, Tensor] = {}
    start_s = time.perf_counter()
    for lr in rates:
        ended: list[nn.Module] = []
        try:
            metrics = train_head(
                run,
                tokens=tokens.train,
                val=tokens.val,
                num_epochs=num_epochs,
                seed=run.seed,
                on_end=ended.append,
                lr=lr,
            )
        except NonFiniteLossError:
            continue
        except ValueError as error:
            best = dataclasses.replace(best, failure=str(error))
            break
        (model,) = ended
        if metrics["head/top1"] > best.top1 or not best_state:
            params = [p for p in model.parameters() if not p.is_meta]
            best = Result(
                head=head,
                top1=metrics["head/top1"],
                top5=metrics["head/top5"],
                num_params=sum(p.numel() for p in params),
                lr=lr,
            )
            best_state = {
                name: tensor.cpu()
                for name, tensor in model.state_dict().items()
                if name.startswith(("head.", "hidden."))
            }
    seconds = time.perf_counter() - start_s
    return dataclasses.replace(best, seconds=seconds), best_state


def nearest(run: Run, *, tokens: TokenSets, num_neighbors: int) -> Result:
    """Classify by the nearest neighbours' labels, weighted by exp(cos / 0.07)."""
    start_s = time.perf_counter()
    model: Any = build_model(without_weights(run.model), num_classes=0).eval()
    keys, labels = _vectors(model, tokens.train)
    queries, wanted = _vectors(model, tokens.val)
    num_classes = len(tokens.train.classes)
    num_neighbors = min(num_neighbors, len(keys))
    hits = dict.fromkeys((1, 5), 0)
    for chosen, own in zip(
        queries.split(_KNN_ROWS), wanted.split(_KNN_ROWS), strict=True
    ):
        near = (chosen @ keys.T).topk(num_neighbors, dim=1)
        votes = torch.zeros(len(chosen), num_classes)
        votes.scatter_add_(1, labels[near.indices], (near.values / _KNN_T).exp())
        ranks = votes.argsort(dim=1, descending=True)
        for most in hits:
            hits[most] += int((ranks[:, :most] == own[:, None]).sum())
    top1, top5 = (100 * count / len(wanted) for count in hits.values())
    seconds = time.perf_counter() - start_s
    return Result(head=KNN, top1=top1, top5=top5, seconds=seconds)


@torch.inference_mode()
def _vectors(model: Any, tokens: TokenSet) -> tuple[Tensor, Tensor]:
    """Read all images' vectors before the classifier, of length 1, and their labels."""
    parts = [
        (functional.normalize(model.forward_head(batch.float(), pre_logits=True)), own)
        for batch, own in TokenReader(tokens).epoch(
            0, batch_size=_KNN_ROWS, shuffle=False
        )
    ]
    return torch.cat([part for part, _ in parts]), torch.cat([own for _, own in parts])
