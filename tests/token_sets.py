"""Make token sets whose classes differ by how their tokens vary together."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import torch

from pipelines.storage.path import StoragePath
from pipelines.transforms.rows import ROW_ID
from tuning.heads.feature_set import TokenSet, part_name, schema, write_part

NUM_CLASSES = 3


def write_token_set(
    folder: Path,
    *,
    num_rows: int = 240,
    shape: tuple[int, ...] = (5, 32),
    num_views: int = 1,
    num_parts: int = 3,
    seed: int = 0,
    value: float | None = None,
    numbered: bool = False,
) -> TokenSet:
    """Write a set whose row `i` has label `i % 3`.

    Tokens are noise, larger in the channels of the class; or `value` throughout. Where
    they are numbered, the first value is the row, and a half more in each view.
    """
    folder.mkdir(parents=True)
    source = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % NUM_CLASSES
    own = torch.arange(shape[-1]) % NUM_CLASSES == labels[:, None]
    views = []
    for view in range(num_views):
        tokens = torch.randn(num_rows, *shape, generator=source)
        tokens *= 1 + 3 * own.view(num_rows, *[1] * (len(shape) - 1), shape[-1])
        if value is not None:
            tokens.fill_(value)
        if numbered:
            tokens.view(num_rows, -1)[:, 0] = torch.arange(num_rows) + view / 2
        content = tokens.half().numpy()
        files: dict[str, list[int]] = {}
        for part in range(num_parts):
            ids = range(
                num_rows * part // num_parts, num_rows * (part + 1) // num_parts
            )
            rows = pa.table(
                {
                    "tokens": [content[at].tobytes() for at in ids],
                    "label": [int(labels[at]) for at in ids],
                    "key": [f"k{at}" for at in ids],
                    ROW_ID: list(ids),
                },
                schema=schema(shape),
            )
            name = part_name(view=view, index=part, num_parts=num_parts)
            write_part(
                StoragePath(str(folder), name),
                rows=rows,
                shape=shape,
                rows_per_group=30,
            )
            groups, rest = divmod(len(ids), 30)
            files[name] = [30] * groups + [rest] * bool(rest)
        views.append(files)
    found = TokenSet(
        place=StoragePath(str(folder)),
        shape=shape,
        classes=tuple(f"c{at}" for at in range(NUM_CLASSES)),
        num_images=num_rows,
        num_bad=0,
        made_of={},
        views=tuple(views),
    )
    found.save()
    return found
