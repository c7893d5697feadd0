"""Build sources of images for tests, with their expected interpretations."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.listing import Listing
from tests.imagenet_files import tar_bytes
from tests.small_sets import jpeg

Files = dict[str, bytes]
Source = Callable[[], Files]


def photos(*names: str) -> Files:
    """Build pictures by their paths."""
    return {name: jpeg(place) for place, name in enumerate(names)}


def classes(*names: str, within: str = "", num: int = 2) -> Files:
    """Build folders of pictures."""
    return photos(*(f"{within}{name}/{i}.jpg" for name in names for i in range(num)))


def samples(labels: dict[str, str], *, suffix: str = "cls") -> Files:
    """Build WebDataset samples by their keys."""
    found: Files = {}
    for key, label in labels.items():
        found |= {f"{key}.jpg": jpeg(len(found)), f"{key}.{suffix}": label.encode()}
    return found


def tars(**of_name: Files) -> Files:
    """Pack files into tars; a double underscore in a name stands for a dash."""
    return {f"{k.replace('__', '-')}.tar": tar_bytes(v) for k, v in of_name.items()}


def parquet(
    labels: list[Any] | pa.Array, *, names: list[str] | None = None, **columns: Any
) -> bytes:
    """Write a Parquet file as Hugging Face does."""
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(len(labels))]
    found = {"image": images, "label": labels} | columns
    table = pa.table({name: v for name, v in found.items() if v is not None})
    if names is not None:
        info = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def zipped(files: Files, *, method: int = zipfile.ZIP_DEFLATED) -> Files:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return {"set.zip": out.getvalue()}


def write(root: Path, files: Files) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(data)
    return root


def labels_of(listing: Listing) -> dict[str, str]:
    """Map each image's key to its class name."""
    keys, labels = (listing.records[n].to_pylist() for n in ("key", "label"))
    return {k: listing.classes[label] for k, label in zip(keys, labels, strict=True)}


@dataclass
class Row:
    """A source, and its expected interpretation."""

    files: Files
    classes: list[str] = field(default_factory=list)
    refused: str = ""
    num: int | None = None
    """Number of images; None for two in each class."""
    left_out: str = ""
    noted: str = ""
    ignored: int = 0
    name: str = ""
    """A file or pattern in the source, if it is not its folder."""
    options: dict[str, Any] = field(default_factory=dict)


CAT_DOG, SPLIT = ["cat", "dog"], ["train", "test"]
PLAIN = classes("cat", "dog")
TWELVE = {f"{i:02d}": f"{i}.0" for i in range(12)}
SPLITS = [("Test", "Train"), ("test2017", "train2017"), ("val", "TRAINING")]
SPLITS += [("train_images", "val_images"), ("testset", "trainset"), ("dev", "train")]
FOLDERS = {
    # Folders: litter is no class and no image, hidden or a system's own.
    **{
        f"{name} beside class folders": Row(
            PLAIN | {f"{name}/0.jpg": b"x"}, CAT_DOG, ignored=1
        )
        for name in (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN")
    },
    "litter in a class folder": Row(
        PLAIN | dict.fromkeys(("cat/.DS_Store", "cat/Thumbs.db", "cat/._0.jpg"), b"x"),
        CAT_DOG,
        ignored=3,
    ),
    "boxes and notes beside images": Row(
        PLAIN | {"cat/cat_boxes.txt": b"0", "dog/0.xml": b"<a/>", "index.csv": b"0"},
        CAT_DOG,
        ignored=3,
    ),
    "a file without a suffix may be an image": Row(
        PLAIN | {"cat/3": jpeg(9)}, CAT_DOG, num=5
    ),
    "a folder below a class, beside its images": Row(
        PLAIN | photos("cat/-x/9.jpg"), CAT_DOG, num=5
    ),
    "an image beside the class folders": Row(
        PLAIN | {"x.jpg": b"x"}, CAT_DOG, left_out="not within a class's folder"
    ),
    "an empty class folder": Row(PLAIN | {"owl/": b""}, [*CAT_DOG, "owl"], num=4),
    "a folder of other files": Row(
        PLAIN | {"notes/a.xml": b""}, CAT_DOG, ignored=1, noted="makes no class"
    ),
    "classes as numbers": Row(
        classes("0", "1", "2", "10"), ["0", "1", "10", "2"], noted="ordered as texts"
    ),
    "capitals alone": Row(classes("Cat", "cat"), ["Cat", "cat"], noted="capitals"),
    "a name composed and not": Row(
        classes("cafe\u0301", "caf\u00e9"), refused="expected one folder for each class"
    ),
    "not composed": Row(classes("cafe\u0301", "dog"), ["caf\u00e9", "dog"]),
    # Splits are no classes, whatever they are called and wherever they lie.
    **{
        f"splits {a}, {b}": Row(classes(a, b), refused=f"splits .*{a}.*--class-depth 1")
        for a, b in SPLITS
    },
    "splits of one name": Row(classes("cat", within="train/"), refused="splits train"),
    "a split beside another folder": Row(
        classes("cat", "dog", within="train/") | photos("extra/0.jpg"),
        refused="splits train.*take one, .*/train, or",
    ),
    "a class named train": Row(
        classes("bus", "train"), ["bus", "train"]
    ),  # a vehicle: its images are in it
    "splits within classes": Row(
        classes(*SPLIT, within="cat/") | classes(*SPLIT, within="dog/"),
        refused="cat holds the splits test, train.*--class-depth 1",
    ),
    "splits that are classes": Row(
        classes("train", "test"), ["test", "train"], options={"class_depth": 1}
    ),
    # Folders around the classes.
    "a folder around all": Row(
        classes(*CAT_DOG, within="dataset/"),
        refused="take what is in it, .*/dataset, or say --class-depth 1",
    ),
    "two folders around all": Row(
        classes(*CAT_DOG, within="a/b/"), refused="cat, dog: take .*/a/b, or say"
    ),
    "images/train": Row(
        classes("cat", within="images/train/") | classes("cat", within="images/val/"),
        refused="holds train, val: take .*/images, or",
    ),
    "a folder around all, by depth": Row(
        classes(*CAT_DOG, within="dataset/"), CAT_DOG, options={"class_depth": 2}
    ),
    "a folder around all, by name": Row(
        classes(*CAT_DOG, within="dataset/"), CAT_DOG, options={"subfolder": "dataset"}
    ),
    "images beside masks": Row(
        classes("images", "masks"), refused="holds images beside masks"
    ),
    "images in one folder": Row(photos("images/0.jpg"), refused="names no class"),
    "folders below classes": Row(
        classes("cat", "dog", within="pets/") | classes("oak", within="plants/"),
        ["pets", "plants"],
        num=6,
        noted=r"pets holds cat, dog.*--class-depth 2",
    ),
    "the same class below two folders": Row(
        classes("cat", within="a/") | classes("cat", within="b/"),
        refused="'a/cat' and 'b/cat'",
        options={"class_depth": 2},
    ),
    "a folder for each class's images": Row(photos("n01/images/0.jpg"), ["n01"], num=1),
    "flat": Row(photos("0.jpg", "1.jpg"), refused="got none but 2 images.*--labels"),
    "nothing but litter": Row({".DS_Store": b"x"}, refused="got none; 1 ignored"),
    # Files of a set beside folders.
    "a stray tar beside class folders": Row(
        PLAIN | tars(old=photos("0.jpg")), refused="--kind folder"
    ),
    "a stray Parquet file beside class folders": Row(
        PLAIN | {"meta.parquet": parquet([0])}, refused="--kind folder.*--kind parquet"
    ),
    "a stray Parquet file in a class folder": Row(
        PLAIN | {"cat/features.parquet": parquet([0])},
        CAT_DOG,
        ignored=1,
        options={"kind": "folder"},
    ),
    "a stray zip beside class folders": Row(
        PLAIN | zipped(PLAIN), refused="--kind folder .*or name .*/set.zip"
    ),
    "what the folders were unpacked from": Row(
        PLAIN | {"set.tar.gz": b"x"}, CAT_DOG, ignored=1
    ),
    "a .json beside class folders in a tar": Row(
        tars(a={"dataset.json": b"{}"} | PLAIN), CAT_DOG, ignored=1
    ),
    "tars and Parquet files": Row(
        tars(a=samples({"0": "0"})) | {"b.parquet": parquet([0])},
        refused="Parquet files and tars: name one",
    ),
    "a picture for the README": Row(
        {"a.parquet": parquet([0, 1]), "logo.png": b"x"}, ["0", "1"], num=2, ignored=1
    ),
    "tars, compressed": Row(
        {"a.tar.gz": tar_bytes(PLAIN, mode="w:gz")}, refused="compressed: unpack"
    ),
}  # fmt: skip
