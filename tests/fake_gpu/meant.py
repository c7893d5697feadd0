"""List each case's intended waits and copies: all others are faults."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sovit.spectral import BATCHED_SINCE
from tests.fake_gpu.answers import NUM_BATCHES
from tests.fake_gpu.cases import ENTERED
from tests.fake_gpu.steps import NUM_STEPS

_LOGGED = (
    "reads a value: pipelines/training/nonfinite.py NonFiniteGuard.check",
    "copies to the device, waiting: pipelines/training/metrics.py MetricSums.total",
    "reads a value: pipelines/training/metrics.py MetricSums.total",
)
# The decomposition itself, or the way to the host and back.
_EIGEN = (
    ("waits inside: sovit/spectral.py symmetric_eig",)
    if torch.__version__ >= BATCHED_SINCE
    else (
        "copies to the host, waiting: sovit/spectral.py symmetric_eig",
        "copies to the device, waiting: sovit/spectral.py symmetric_eig",
    )
    * NUM_STEPS
)
# PyTorch's own: it times the first ten steps, and every hundredth after them.
_TIMED = "waits for an event: pipelines/training/step.py _forward_backward"
_UPLOADED = (
    "copies to the device: pipelines/transforms/normalize.py Finisher.__call__",
    *("copies to the device: pipelines/data/batching.py batches",) * 2,
)
_SUPPLIED = (
    "copies to the device, waiting: pipelines/transforms/normalize.py _tiled",
    "copies to the device, waiting: "
    "pipelines/transforms/decoder.py BatchDecoder.__init__",
    *_UPLOADED * NUM_BATCHES,
)
_SUMMED = _LOGGED[1:]
_SCORES = "pipelines/evaluation/scores.py"
_WORST = f"{_SCORES} WorstSoFar"
_EVALUATED = (
    # Once, before the first batch.
    "copies to the device, waiting: pipelines/evaluation/measure.py validate",
    *(f"copies to the device, waiting: {_WORST}.__init__",) * 2,
    # Each batch: which images they are; with the first, which classes.
    "copies to the device: pipelines/evaluation/measure.py validate",
    "copies to the device, waiting: pipelines/evaluation/measure.py Narrowed.forward",
    "copies to the device: pipelines/evaluation/measure.py validate",
    # Once, after the last one: sums of both models, and the first one's images.
    *(
        *_SUMMED,
        f"reads a value: {_SCORES} RealSums.total",
        f"copies to the host, waiting: {_SCORES} ConfusionSums.total",
    )
    * 2,
    *(
        f"takes a shape from values: {_WORST}.total",
        f"copies to the host, waiting: {_WORST}.total",
    )
    * 2,
)
_HEAD = "tuning/heads/train.py _Trainer"
_HEAD_TRAINED = (
    "copies to the device, waiting: tuning/heads/train.py build_head",
    *(
        f"copies to the device: {_HEAD}._train",
        f"copies to the device: {_HEAD}._logits",
    )
    * NUM_BATCHES,
    *_SUMMED,
    f"copies to the device: {_HEAD}._evaluate",
    f"copies to the device: {_HEAD}._logits",
    *_SUMMED,
)
# By case, what is to be seen, in order; nothing of all others.
MEANT: Mapping[str, tuple[str, ...]] = {
    "step of gcp.mpncov_resnet50": _EIGEN,
    "step, logged": _LOGGED * NUM_STEPS,
    "step of 8 workers, data parallel": (_TIMED,),
    "step of 8 workers, data parallel, accumulated, logged": (_TIMED, *_LOGGED),
    "step of 8 workers, sharded, accumulated, logged": _LOGGED,
    "copy of a checkpoint": (
        "copies to the host: pipelines/checkpoints/snapshot.py copied",
        "waits for a stream: pipelines/checkpoints/snapshot.py take_snapshot",
    ),
    "supply of images": _SUPPLIED,
    "evaluation": (*_SUPPLIED, *_EVALUATED),
    "prediction": (
        "copies to the device: pipelines/predict.py _answers",
        "reads a value: pipelines/predict.py _top",
    ),
    "probe": ("reads a value: pipelines/worker/gradient_probe.py _band",) * 5,
    "training of a head": _HEAD_TRAINED,
    # Called by nobody of ours.
    ENTERED: (
        "copies to the host: nobody of ours",
        "waits for the device: nobody of ours",
        "copies to the device: nobody of ours",
        "waits for a stream: nobody of ours",
    ),
}
