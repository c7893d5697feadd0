"""Turn a unit's encoded images into a file of tokens, within an actor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.config import Run
from pipelines.data.epoch_plan import EpochPlan, plan_epoch
from pipelines.data.shard_set import ShardSet
from pipelines.hardware.device import device_of
from pipelines.storage.path import StoragePath
from pipelines.training.step import autocast
from pipelines.transforms.decoder import BatchDecoder
from pipelines.transforms.rows import BadImage, Rows, rows_of
from tuning.heads.backbone import Backbone
from tuning.heads.feature_set import bytes_per_image, part_name, schema, write_part
from tuning.heads.parts import INDEX, SPLIT, VIEW

if TYPE_CHECKING:
    import ray

MADE_OF, BAD = "made_of", "bad"
NUM_IMAGES = "num_images"
_FLOAT16_MAX = 65504.0
_MAX_PART_BYTES = 64 << 20
_MAX_PART_ROWS = 4096
# So many files keep a few actors busy to the end.
_MIN_PARTS = 16


@dataclass(frozen=True, kw_only=True)
class TokenJob:
    """Settings and destination of one split's tokens."""

    run: Run
    """Its model is the backbone's, which also says the images' size."""
    out: StoragePath
    shape: tuple[int, ...]
    num_views: int
    num_parts: int
    """Files of one view."""
    batch_rows: int
    """Images that go through the model at once."""
    made_of: dict[str, Any]

    def name(self, *, view: int, index: int) -> str:
        """Return the file name of a part."""
        return part_name(view=view, index=index, num_parts=self.num_parts)


def make_job(
    run: Run,
    *,
    shards: ShardSet,
    out: StoragePath,
    backbone: Backbone,
    num_views: int,
) -> TokenJob:
    """Build the job of one split."""
    data = dataclasses.replace(run.data, decode_on="workers")
    run = dataclasses.replace(run, model=backbone.model, data=data)
    pixels = ("eval_interpolation", "crop_pct", "mean", "std")
    if data.exif != "ignore":  # sets of before the field was there go on
        pixels = (*pixels, "exif")
    made_of: dict[str, Any] = {
        **backbone.made_of,
        "data": shards.digest,
        "pixels": {name: getattr(data, name) for name in pixels},
        "amp": run.scale.amp,
        "num_views": num_views,
    }
    if num_views > 1:
        made_of |= {"augment": dataclasses.asdict(run.augment), "seed": run.seed}
    plan = part_plan(shards, shape=backbone.shape)
    return TokenJob(
        run=run,
        out=out,
        shape=backbone.shape,
        num_views=num_views,
        num_parts=plan.shape.num_units,
        batch_rows=min(data.eval_batch_size, plan.shape.unit_rows),
        # As JSON has it, to be held against what a file says.
        made_of=json.loads(json.dumps(made_of)),
    )


def part_plan(shards: ShardSet, *, shape: tuple[int, ...]) -> EpochPlan:
    """Cut a split into units, one per file, in the order of its rows.

    It depends on nothing else: files of a job that was stopped fit those of the next.
    """
    groups = shards.groups
    most = min(_MAX_PART_BYTES // bytes_per_image(shape), _MAX_PART_ROWS)
    rows = max(min(most, groups.total_rows // _MIN_PARTS), 1)
    return plan_epoch(groups, batch_size=1, shuffle_rows=rows, shuffle=False)


class TokenWriter:
    """Decoder of a unit's images that computes and writes their tokens.

    Takes tables of `read_part` and returns one row each, with the number of images.
    Raises ValueError where tokens do not fit float16.
    """

    def __init__(self, jobs: Mapping[str, TokenJob], *, backbone: Backbone) -> None:
        self._run = next(iter(jobs.values())).run
        scale = self._run.scale
        if not scale.use_gpu:
            torch.set_num_threads(max(int(scale.cpus_per_worker), 1))
        self._jobs = jobs
        self._device = device_of(scale.use_gpu, flag="--scale.use-gpu")
        model = backbone.build().to(self._device)
        self._model: Any = model.to(memory_format=torch.channels_last)
        self._decoders: dict[tuple[int, bool], BatchDecoder] = {}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Process one unit."""
        split, view, index = (table[name][0].as_py() for name in (SPLIT, VIEW, INDEX))
        job = self._jobs[split]
        rows = rows_of(table)
        bad: list[BadImage] = []
        done = [
            (
                part.keys.filter(pa.array(good)),
                part.labels[good],
                part.ids[good],
                values,
            )
            for part, good, values in self._tokens(rows, job=job, view=view, bad=bad)
        ]
        keys, labels, ids, values = zip(*done, strict=True)
        columns = [
            _fixed_size_binary(torch.cat(values), size=bytes_per_image(job.shape)),
            pa.array(np.concatenate(labels)),
            pa.concat_arrays(keys),
            pa.array(np.concatenate(ids)),
        ]
        metadata = {
            MADE_OF: json.dumps(job.made_of),
            BAD: json.dumps([(one.row_id, one.key, one.reason) for one in bad]),
        }
        write_part(
            job.out.within(job.name(view=view, index=index)),
            rows=pa.table(columns, schema=schema(job.shape)),
            shape=job.shape,
            metadata=metadata,
        )
        return pa.table({NUM_IMAGES: [len(rows)]})

    @torch.inference_mode()
    def _tokens(
        self, rows: Rows, *, job: TokenJob, view: int, bad: list[BadImage]
    ) -> Iterator[tuple[Rows, np.ndarray, Tensor]]:
        """Yield rows, the mask of the good ones, and their tokens as float16."""
        size = job.batch_rows
        decode = self._decoder(num_rows=size, train=view > 0)
        for start in range(0, len(rows), size):
            part = rows.cut(start, start + size)
            found = decode(part, view)
            bad += found.bad
            good = found.weights[: len(part)] > 0
            with autocast(self._device, amp=self._run.scale.amp):
                tokens = self._model.forward_features(found.images)
            tokens = tokens[: len(part)][torch.from_numpy(good).to(tokens.device)]
            self._check(tokens, keys=part.keys.filter(pa.array(good)))
            yield part, good, tokens.half().contiguous().cpu()

    def _decoder(self, *, num_rows: int, train: bool) -> BatchDecoder:
        kind = (num_rows, train)
        if kind not in self._decoders:
            self._decoders[kind] = BatchDecoder(
                self._run.pixels(train=train),
                num_rows=num_rows,
                device=self._device,
            )
        return self._decoders[kind]

    def _check(self, tokens: Tensor, *, keys: pa.Array) -> None:
        """Reject tokens that overflow float16, naming the image."""
        largest = tokens.flatten(1).abs().amax(dim=1).float()
        wrong = (~(largest <= _FLOAT16_MAX)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"{keys[at].as_py()}: expected tokens up to {_FLOAT16_MAX:,.0f}, which "
                f"float16 holds, got {largest[at].item():,.0f} from "
                f"{self._run.model.name}; choose a backbone that normalises its "
                "features"
            )


class WriterActor:
    """Actor around a `TokenWriter`: it gets the backbone from Ray's object store.

    Here and not beside the job, so that an actor starts without Ray Data and Train.
    """

    def __init__(
        self, jobs: Mapping[str, TokenJob], *, backbone: ray.ObjectRef[Backbone]
    ) -> None:
        import ray

        self._write = TokenWriter(jobs, backbone=ray.get(backbone))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Process one unit."""
        return self._write(table)


def _fixed_size_binary(tokens: Tensor, *, size: int) -> pa.Array:
    content = pa.py_buffer(tokens.numpy())
    return pa.Array.from_buffers(pa.binary(size), len(tokens), [None, content])
