"""A table of sources, and what each must be understood to be, or why it is refused."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.shards.listing import Fields, Listing
from pipelines.shards.sources import list_source
from pipelines.storage.path import StoragePath
from tests.small_sets import jpeg
from tests.understood import (
    CAT_DOG,
    FOLDERS,
    PLAIN,
    TWELVE,
    Row,
    classes,
    parquet,
    photos,
    samples,
    tars,
    write,
    zipped,
)

TABLE = FOLDERS | {
    # Tars of class folders, of classes, and of what is neither.
    "class folders in a tar": Row(tars(a=PLAIN), CAT_DOG),
    "class folders in some tars": Row(
        tars(part1=classes("cat", "dog"), part2=photos("cat/9.jpg", "dog/9.jpg")),
        CAT_DOG,
        num=6,
    ),
    "tars of a class each": Row(tars(cat=photos("0.jpg"), dog=photos("0.jpg")),
                                CAT_DOG, num=2),
    "numbered tars without labels": Row(
        tars(a__00=photos("0.jpg"), a__01=photos("1.jpg")),
        refused="not named as a class.*--kind ilsvrc-train",
    ),
    "numbered tars that are classes": Row(
        tars(a__00=photos("0.jpg"), a__01=photos("1.jpg")),
        ["a-00", "a-01"],
        num=2,
        options={"kind": "ilsvrc-train"},
    ),
    "class tars and held-out images": Row(
        tars(n01440764=photos("0.jpg"), ILSVRC2012_img_val=photos("v.jpg")),
        refused="ILSVRC2012_img_val.tar is not named as a class",
    ),
    "tars in a tar, and images": Row(
        tars(ILSVRC2012_img_train=tars(n01=PLAIN), ILSVRC2012_img_val=photos("v.jpg")),
        refused=r"train.tar \(tars within\) and .*val.tar \(images alone\)",
    ),
    "one tar of images": Row(tars(a=photos("0.jpg")), refused="--labels FILE"),
    "class tars beside a text": Row(
        tars(train={"README": b"x", ".x": b""} | tars(n01=photos("0.jpg"))),
        ["n01"],
        num=1,
        left_out="not within a class's tar",
        ignored=1,
    ),
    # WebDataset.
    "labels as texts": Row(tars(a=samples({"0": "cat", "1": "dog"})), CAT_DOG, num=2),
    "names in capitals": Row(tars(a={"0.JPG": jpeg(0), "0.CLS": b"0"}), ["0"], num=1),
    "images before all labels": Row(
        tars(
            a=photos(*(f"{i:02d}.jpg" for i in range(40)))
            | {f"{i:02d}.cls": b"%d" % (i % 2) for i in range(40)}
        ),
        ["0", "1"],
        num=40,
    ),
    "labels in .txt": Row(
        tars(
            a__0=samples({f"a{i}": str(i % 2) for i in range(4)}, suffix="txt"),
            a__1=samples({f"b{i}": str(i % 2) for i in range(4)}, suffix="txt"),
        ),
        ["0", "1"],
        num=8,
    ),
    "captions in .txt": Row(
        tars(a=samples({str(i): f"photo of {i} cats" for i in range(4)}, suffix="txt")),
        refused="captions",
    ),
    "captions in .json": Row(
        tars(
            a=samples(
                {f"{i:03d}": json.dumps({"label": f"no. {i}"}) for i in range(150)},
                suffix="json",
            )
        ),
        refused="expected labels that images share, got 150",
    ),
    "numbers with a point": Row(
        tars(a=samples(TWELVE)), [str(i) for i in range(12)], num=12
    ),
    "numbers that are no classes": Row(
        tars(a=samples({"0": "0.5", "1": "0.25"})), refused="numbers such as 0.5"
    ),
    "numbers and names": Row(
        tars(a=samples({"0": "7", "1": "cat"})), refused="all numbers or all names"
    ),
    "numbers from 1": Row(
        tars(a=samples({"0": "1", "1": "2"})), refused="--count-from 1"
    ),
    "numbers from 1, as said": Row(
        tars(a=samples({"0": "1", "1": "2"})),
        ["1", "2"],
        num=2,
        options={"count_from": 1},
    ),
    "dates": Row(
        tars(a=samples({"0": "20231105", "1": "0"})), refused="20,231,106 classes"
    ),
    "no class": Row(tars(a=samples({"0": "-1"})), refused="from 0 on, got -1; neg"),
    "a dotfile": Row(
        tars(a=samples({"0": "0"}) | {".gitkeep": b"", "._0.jpg": b"x"}),
        ["0"],
        num=1,
        ignored=2,
    ),
    "two images in each sample": Row(
        tars(a=samples({"0": "0"}) | {"0.png": b"x"}),
        refused=r"1 left out: 2 images in the sample \(jpg, png\).*--image-field",
    ),
    "two images, and which": Row(
        tars(a=samples({"0": "0"}) | {"0.png": b"x"}),
        ["0"],
        num=1,
        options={"image": "jpg"},
    ),
    "another field": Row(
        tars(a={"0.jpg": jpeg(0), "0.json": b'{"id": "cat"}'}),
        refused="no label or cls, but id: --label-field",
    ),
    "another field, named": Row(
        tars(a={"0.jpg": jpeg(0), "0.json": b'\xef\xbb\xbf{"id": 0.0}'}),
        ["0"],
        num=1,
        options={"label": "id"},
    ),
    "other suffixes": Row(
        tars(a={"0.in.jpg": jpeg(0), "0.out.cls": b"0"}),
        refused=r"but .in.jpg, .out.cls .*--image-field",
        options={"kind": "webdataset"},
    ),
    "other suffixes, named": Row(
        tars(a={"0.in.jpg": jpeg(0), "0.out.cls": b"0"}),
        ["0"],
        num=1,
        options={"image": "in.jpg", "label": "out.cls"},
    ),
    # Halves of two sets.
    "tars of two splits": Row(
        tars(x__train__0=samples({"0": "0"}), x__val__0=samples({"0": "0"})),
        refused="splits train, val|splits x-train",
    ),
    "Parquet of two splits in folders": Row(
        {"train/0.parquet": parquet([0]), "test/0.parquet": parquet([0])},
        refused="splits test, train.*test/",
    ),
    "files of two numbers": Row(
        {f"a-0000{i}-of-0000{n}.parquet": parquet([0]) for i, n in [(0, 2), (1, 3)]},
        refused="parts of sets of 2 and 3 files",
    ),
    "a file is missing": Row(
        {f"a-0000{i}-of-00003.parquet": parquet([0]) for i in (0, 2)},
        refused=r"2 of the 3 files of 'a', the first missing is number 1.*a-\*.parquet",
    ),
    "a file is missing, as said": Row(
        {f"a-0000{i}-of-00003.parquet": parquet([0]) for i in (0, 2)},
        ["0"],
        num=2,
        name="a-*.parquet",
    ),
    # Parquet.
    "labels as texts in Parquet": Row(
        {"a.parquet": parquet(["dog", "cat"])}, CAT_DOG, num=2
    ),
    "no label": Row(
        {"a.parquet": parquet([*range(11), None])},
        [str(i) for i in range(11)],
        num=11,
        left_out="no label",
    ),
    "numbers with a point in Parquet": Row(
        {"a.parquet": parquet([1.0, 0.0, float("nan")])},
        ["0", "1"],
        num=2,
        left_out="no label",
    ),
    "coded labels": Row(
        {"a.parquet": parquet(pa.array(CAT_DOG).dictionary_encode())}, CAT_DOG, num=2
    ),
    "true or not": Row({"a.parquet": parquet([True, False])}, ["false", "true"], num=2),
    "dates in Parquet": Row(
        {"a.parquet": parquet(pa.array([1, 2], pa.date32()))}, refused="label as date32"
    ),
    "names that disagree": Row(
        {
            "0.parquet": parquet([0, 1], names=["a", "b"]),
            "1.parquet": parquet([0, 1], names=["b", "a"]),
        },
        refused="expected the same class names in all files, got 2, a, b, ... in",
    ),
    "names in one alone": Row(
        {"0.parquet": parquet([0], names=["a"]), "1.parquet": parquet([0])},
        refused="got 1, a, ... in .*0.parquet and none in .*1.parquet",
    ),
    "paths alone": Row(
        {"a.parquet": parquet([0], image=[{"bytes": None, "path": "x.jpg"}])},
        refused="got their paths alone",
    ),
    "paths alone, typed": Row(
        {
            "a.parquet": parquet(
                [0],
                image=pa.array(
                    [{"bytes": None, "path": "x"}],
                    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                ),
            )
        },
        refused="got their paths alone",
    ),
    "other columns": Row(
        {"a.parquet": parquet([0], image=None, label=None, img=[jpeg(0)], fine=[0])},
        refused="got img, fine; name them by --image-field and --label-field",
    ),
    "other columns, named": Row(
        {"a.parquet": parquet([0], image=None, label=None, img=[jpeg(0)], fine=[0])},
        ["0"],
        num=1,
        options={"image": "img", "label": "fine"},
    ),
    "a shard set's classes": Row(
        {"s.parquet": parquet([1, 0]), "classes.json": b'["cat", "dog"]'},
        CAT_DOG,
        num=2,
        ignored=1,
    ),
    # Zips.
    "class folders in a zip": Row(
        zipped(PLAIN | {"__MACOSX/._0.jpg": b"x"}), CAT_DOG, ignored=1, name="set.zip"
    ),
    "a folder with a zip": Row(zipped(PLAIN), CAT_DOG),
    "splits in a zip": Row(
        zipped(classes(*CAT_DOG, within="train/") | classes("cat", within="test/")),
        refused="splits test, train.*take one, --subfolder train, or",
    ),
    "splits in a zip, and which": Row(
        zipped(classes(*CAT_DOG, within="train/") | classes("cat", within="test/")),
        CAT_DOG,
        options={"subfolder": "train"},
    ),
    "no such folder in a zip": Row(
        zipped(PLAIN), refused="its folders are cat, dog", options={"subfolder": "x"}
    ),
    "a way in a zip that is compressed otherwise": Row(
        zipped(PLAIN, method=zipfile.ZIP_LZMA), refused="compressed by method 14"
    ),
    "a zip that climbs": Row(zipped({"../x.jpg": b"x"}), refused="do not trust"),
    "a zip cut short": Row(
        {"set.zip": zipped(PLAIN)["set.zip"][:-30]}, refused="not a whole zip"
    ),
}  # fmt: skip


def understand(row: Row, root: Path | str) -> Listing:
    options = dict(row.options)
    fields = Fields(options.pop("image", None), options.pop("label", None))
    source = f"{root}/{row.name}" if row.name else root
    return list_source(source, fields=fields, **options)


def check(row: Row, listing: Listing) -> None:
    assert listing.classes == row.classes
    num = 2 * len(row.classes) if row.num is None else row.num
    assert len(listing.records) == num
    reasons = {item.reason.partition(": ")[0] for item in listing.skipped}
    assert reasons == ({row.left_out} if row.left_out else set())
    assert sum(listing.ignored.values()) == row.ignored
    assert bool(listing.notes) == bool(row.noted)
    assert re.search(row.noted, " ".join(listing.notes))


@pytest.mark.parametrize("name", TABLE)
def test_what_a_source_is(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    root = write(tmp_path / "source", row.files)
    if row.refused:
        with pytest.raises(ValueError, match=row.refused) as caught:
            understand(row, root)
        assert "\n" not in str(caught.value)
        assert str(root) in str(caught.value)
        return
    check(row, understand(row, root))


@pytest.mark.parametrize("name", TABLE)
def test_it_is_the_same_in_a_bucket(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    address = f"memory://{tmp_path.name}"
    files = {path: data for path, data in row.files.items() if not path.endswith("/")}
    if len(files) < len(row.files):
        pytest.skip("a bucket has no empty folders")
    for path, data in files.items():
        StoragePath(f"{address}/{path}").write(data)
    if row.refused:
        with pytest.raises(ValueError, match=row.refused):
            understand(row, address)
        return
    here = understand(row, write(tmp_path / "source", files))
    there = understand(row, address)
    check(row, there)
    assert there.digest() == here.digest()
