"""List WebDataset tars: files of one name are one sample, its image and its label."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.shards.classes import (
    MAX_OWN_LABELS,
    Numbering,
    label_text,
    refuse_captions,
    resolve_texts,
)
from pipelines.shards.listing import Builder, Fields, Listing
from pipelines.shards.stored import open_stored, stem
from pipelines.shards.suffixes import IMAGE_SUFFIXES
from pipelines.shards.tars import Member, image_files, sample_key

_LABEL_FIELDS = ("label", "cls")
_MAX_LABEL_BYTES = 16 << 20


@dataclass(slots=True)
class _Sample:
    images: list[Member] = field(default_factory=list)
    suffixes: list[str] = field(default_factory=list)
    label: str | None = None
    rank: int = 9
    problem: str = ""


def list_webdataset(
    paths: Sequence[str], *, numbering: Numbering, fields: Fields
) -> Listing:
    """List WebDataset tars: KEY.jpg (or .png, .webp, ...) beside KEY.cls or KEY.json.

    A .cls holds a class name or a number; a .json has it under "label" or "cls"; a
    .txt counts where there is neither. `fields` name others: a suffix, or a field of
    the .json. Suffixes are compared in lower case. Keys are TAR/KEY.SUFFIX, since
    WebDataset's own are unique in a tar at most.
    """
    builder = Builder("tar", layout="WebDataset tars")
    sources = Counter[int]()
    for path in paths:
        builder.containers.append(path)
        for key, sample in _read_samples(builder, path=path, fields=fields).items():
            reason = _problem(sample, fields=fields)
            if reason:
                builder.skip(f"{stem(path)}/{key}", source=path, reason=reason)
                continue
            sources[sample.rank] += 1
            image = sample.images[0]
            builder.add(
                f"{stem(path)}/{image.name}",
                name=sample.label or "",
                offset=image.offset,
                size_bytes=image.size_bytes,
            )
    names, num_images = builder.names(), len(builder.keys)
    is_text = sources[2] * 2 > num_images and fields.label is None
    most = 1 if is_text else MAX_OWN_LABELS
    with builder.explaining():
        refuse_captions(names, num_images=num_images, numbering=numbering, most=most)
        ordered, labels = resolve_texts(names, numbering=numbering)
    return builder.finish(ordered, labels=labels)


def _problem(sample: _Sample, *, fields: Fields) -> str:
    others = ", ".join(f".{name}" for name in sample.suffixes[:5])
    if len(sample.images) > 1:
        kinds = ", ".join(_suffix(image.name) for image in sample.images)
        return (
            f"{len(sample.images)} images in the sample ({kinds}), expected one: "
            "--image-field names it"
        )
    if not sample.images:
        wanted = f".{fields.image}" if fields.image else "no image"
        return (
            f"{wanted} in the sample, but {others} (a sample's name ends at its first "
            "dot): --image-field names a suffix"
        )
    if sample.label is None:
        if sample.problem:
            return sample.problem
        if fields.label:
            return f"no {fields.label!r} in the sample: mend --label-field"
        tail = f", but {others}: --label-field names one" if others else ""
        return f"no .cls and no .json with a label{tail}"
    return ""


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _read_samples(builder: Builder, *, path: str, fields: Fields) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    with open_stored(path) as file:
        for member in image_files(builder, path=path):
            kind = _suffix(member.name)
            sample = samples.setdefault(sample_key(member.name), _Sample())
            if kind == fields.image or (not fields.image and kind in IMAGE_SUFFIXES):
                sample.images.append(member)
                continue
            rank = _rank(kind, wanted=fields.label)
            if rank is None or member.size_bytes > _MAX_LABEL_BYTES:
                sample.suffixes.append(kind)
                continue
            file.seek(member.offset)
            data = file.read(member.size_bytes)
            _take_label(sample, data, kind=kind, rank=rank, wanted=fields.label)
    return samples


def _rank(kind: str, *, wanted: str | None) -> int | None:
    """Rank a file by how it may hold the label, the first counts; None for never."""
    if wanted and kind == wanted.lower().lstrip("."):
        return 0
    if wanted:
        return 1 if kind == "json" else None
    return {"cls": 0, "json": 1, "txt": 2}.get(kind)


def _take_label(
    sample: _Sample, data: bytes, *, kind: str, rank: int, wanted: str | None
) -> None:
    try:
        text = data.decode("utf-8-sig")
        is_field = kind == "json" and rank == 1
        value = _of_json(text, sample=sample, wanted=wanted) if is_field else text
        label = label_text(value)
    except (ValueError, RecursionError):
        sample.problem = f"its .{kind} cannot be read"
        return
    if label is None:
        sample.problem = sample.problem or f"its .{kind} has no label"
    elif rank < sample.rank:
        sample.label, sample.rank = label, rank


def _of_json(text: str, *, sample: _Sample, wanted: str | None) -> object:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("no object")
    for name in [wanted] if wanted else _LABEL_FIELDS:
        if found.get(name) is not None:
            return None if isinstance(found[name], bool) else found[name]
    names = ", ".join(sorted(map(str, found))[:5]) or "nothing"
    asked = wanted or " or ".join(_LABEL_FIELDS)
    sample.problem = f"its .json has no {asked}, but {names}: --label-field names one"
    return None
