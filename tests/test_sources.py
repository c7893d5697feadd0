"""Every kind of source is told apart, listed whole, and refused where unclear."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.shards.listing import Listing
from pipelines.shards.sources import list_source
from pipelines.shards.tars import scan_tar

CLASSES = ["n01", "n02", "n03"]


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + value, 8), (value, 90, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def class_images() -> dict[str, dict[str, bytes]]:
    return {
        name: {f"{name}_{i}.JPEG": jpeg(10 * place + i) for i in range(3 + place)}
        for place, name in enumerate(CLASSES)
    }


def write_tree(root: Path) -> dict[str, tuple[int, bytes]]:
    for name, images in class_images().items():
        for place, (file, data) in enumerate(images.items()):
            folder = root / name / ("deeper" if place == 2 else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
    return {
        f"{name}/{'deeper/' if place == 2 else ''}{file}": (label, data)
        for label, (name, images) in enumerate(class_images().items())
        for place, (file, data) in enumerate(images.items())
    }


def labels_of(listing: Listing) -> dict[str, int]:
    keys, labels = (listing.records[n].to_pylist() for n in ("key", "label"))
    return dict(zip(keys, labels, strict=True))


def read_all(listing: Listing) -> dict[str, bytes]:
    images = {}
    for record in listing.records.to_pylist():
        with Path(listing.containers[record["container"]]).open("rb") as file:
            file.seek(record["offset"])
            images[record["key"]] = file.read(record["size_bytes"])
    return images


def test_folder(tmp_path: Path) -> None:
    wanted = write_tree(tmp_path)
    (tmp_path / "README").write_text("no image")
    (tmp_path / "n01" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "n02" / "loop").symlink_to(tmp_path / "n02")
    listing = list_source(tmp_path)
    assert (listing.kind, listing.classes) == ("folder", CLASSES)
    assert labels_of(listing) == {key: label for key, (label, _) in wanted.items()}
    reasons = {item.key: item.reason for item in listing.skipped}
    assert reasons == {
        "README": "not within a class's folder",
        "n01/gone.jpg": "not a plain file",
    }


@pytest.mark.parametrize("nested", [True, False])
def test_imagenet_train_tars(tmp_path: Path, nested: bool) -> None:
    inner = {f"{n}.tar": tar_bytes(images) for n, images in class_images().items()}
    source = tmp_path / "ILSVRC2012_img_train.tar"
    if nested:
        source.write_bytes(tar_bytes(inner))
    else:
        source = tmp_path
        for name, data in inner.items():
            (tmp_path / name).write_bytes(data)
    listing = list_source(source)
    assert listing.classes == CLASSES
    wanted = {
        f"{name}/{file}": data
        for name, images in class_images().items()
        for file, data in images.items()
    }
    assert read_all(listing) == wanted
    labels = labels_of(listing)
    assert labels == {key: CLASSES.index(key[:3]) for key in wanted}


VAL_LABELS = ["n03", "n01", "n03", "n02"]


def write_val(folder: Path, *, text: str) -> tuple[Path, Path]:
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1, 4, 2)]
    tar, labels = folder / "ILSVRC2012_img_val.tar", folder / "labels.txt"
    tar.write_bytes(tar_bytes({name: jpeg(int(name[-6])) for name in names}))
    labels.write_text(text)
    return tar, labels


@pytest.mark.parametrize(
    "text",
    [
        "n03\nn01\nn03\nn02\n",
        "2\n0\n2\n1\n",
        "ILSVRC2012_val_00000002 n01\nILSVRC2012_val_00000001.JPEG n03\n"
        "ILSVRC2012_val_00000004, n02\nILSVRC2012_val_00000003 n03\n",
    ],
    ids=["names", "places", "pairs"],
)
def test_imagenet_val_tar(tmp_path: Path, text: str) -> None:
    tar, labels = write_val(tmp_path, text=text)
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    listing = list_source(tar, labels=labels, classes_file=tmp_path)
    found = labels_of(listing)
    assert [CLASSES[found[key]] for key in sorted(found)] == VAL_LABELS
    assert read_all(listing)["ILSVRC2012_val_00000004.JPEG"] == jpeg(4)


def test_devkit_ids_need_their_synsets(tmp_path: Path) -> None:
    tar, labels = write_val(tmp_path, text="1\n2\n1\n3\n")
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(CLASSES))
    with pytest.raises(ValueError, match="--synsets"):
        list_source(tar, labels=labels, classes_file=classes)
    synsets = tmp_path / "synsets.txt"
    synsets.write_text("1 n03\n2 n01\n3 n02\n4 n04\n")
    listing = list_source(tar, labels=labels, synsets=synsets, classes_file=classes)
    found = labels_of(listing)
    assert [CLASSES[found[key]] for key in sorted(found)] == VAL_LABELS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n03\nn01\nn03\n", "expected 4 lines"),
        ("0\n1\n2\n1\n", "needs the order of the classes"),
        ("a n01\nb n02\nc n03\nd n01\n", "none for"),
    ],
)
def test_unclear_val_labels_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    tar, labels = write_val(tmp_path, text=text)
    with pytest.raises(ValueError, match=message):
        list_source(tar, labels=labels)


def test_val_tar_without_labels_is_refused(tmp_path: Path) -> None:
    tar, _ = write_val(tmp_path, text="")
    with pytest.raises(ValueError, match="--labels FILE"):
        list_source(tar)


def webdataset(label: str, *, suffix: str = "cls") -> dict[str, bytes]:
    return {"a/0001.jpg": jpeg(1), f"a/0001.{suffix}": label.encode()}


def test_webdataset(tmp_path: Path) -> None:
    (tmp_path / "x-0.tar").write_bytes(
        tar_bytes(
            webdataset("2\n")
            | {"0002.png": b"png", "0002.json": b'{"label": 1, "more": []}'}
            | {"0003.webp": b"webp", "0004.jpg": b"x", "0004.cls": b"\xff"}
        )
    )
    (tmp_path / "x-1.tar").write_bytes(tar_bytes({"./b.JPG": b"j", "./b.cls": b"0"}))
    listing = list_source(tmp_path)
    assert listing.classes == ["0", "1", "2"]
    wanted = {"x-0/a/0001.jpg": 2, "x-0/0002.png": 1, "x-1/b.JPG": 0}
    assert labels_of(listing) == wanted
    assert read_all(listing)["x-0/a/0001.jpg"] == jpeg(1)
    reasons = {item.key: item.reason for item in listing.skipped}
    assert reasons == {
        "x-0/0003": "no .cls and no .json with a label",
        "x-0/0004": "its .cls cannot be read",
    }


def test_webdataset_labels_by_name_and_place_must_agree(tmp_path: Path) -> None:
    tar, classes = tmp_path / "x.tar", tmp_path / "classes.txt"
    tar.write_bytes(tar_bytes(webdataset('{"label": "cat"}', suffix="json")))
    classes.write_text("dog\ncat\n")
    assert labels_of(list_source(tar, classes_file=classes)) == {"x/a/0001.jpg": 1}
    tar.write_bytes(tar_bytes(webdataset("1")))
    classes.write_text("1\n2\n")
    with pytest.raises(ValueError, match="place of another"):
        list_source(tar, classes_file=classes)


@pytest.mark.parametrize("label", ["3", "-1", "bird"])
def test_labels_outside_the_classes_are_refused(tmp_path: Path, label: str) -> None:
    tar, classes = tmp_path / "x.tar", tmp_path / "classes.txt"
    tar.write_bytes(tar_bytes(webdataset(label)))
    classes.write_text("dog\ncat\nfox\n")
    with pytest.raises(
        ValueError, match=r"labels are not among|expected labels from 0"
    ):
        list_source(tar, classes_file=classes)


@pytest.mark.parametrize("name", ["/etc/0001.jpg", "a/../../0001.jpg"])
def test_members_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(tar_bytes({name: b"x", "0001.cls": b"0"}))
    with pytest.raises(ValueError, match="do not trust"):
        list_source(tar, kind="webdataset")


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    data = tar_bytes({f"{i}.jpg": bytes(700) for i in range(3)})
    assert len(data) == 10_240
    for cut, message in [(data[:4000], "cut short|not a whole"), (b"", "not a whole")]:
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=message):
            list(scan_tar(path))
    # The second header, at 512 + 1024: tarfile would quietly end there.
    path.write_bytes(data[:1536] + b"garbage" + data[1543:])
    with pytest.raises(ValueError, match="damaged at byte 1536"):
        list(scan_tar(path))
    path.write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match="compressed"):
        list(scan_tar(path))


def test_long_names_and_links_in_tars(tmp_path: Path) -> None:
    path, name = tmp_path / "n01.tar", "d/" * 70 + "é.jpg"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    listing = list_source(path, kind="ilsvrc-train")
    assert read_all(listing) == {f"n01/{name}": b"abc"}
    assert [item.key for item in listing.skipped] == ["link.jpg"]


def test_sources_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no"):
        list_source(tmp_path / "gone")
    with pytest.raises(ValueError, match="got none"):
        list_source(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="Cannot tell what"):
        list_source(tmp_path / "a.txt")
    for split in ("train", "val"):
        (tmp_path / split / "n01").mkdir(parents=True)
    with pytest.raises(ValueError, match="splits train, val"):
        list_source(tmp_path)
    (tmp_path / "train" / "n01" / "x.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="for ilsvrc-val"):
        list_source(tmp_path / "train", labels=tmp_path / "a.txt")
    (tmp_path / "classes").write_text("n02\n")
    with pytest.raises(ValueError, match="'n01'"):
        list_source(tmp_path / "train", classes_file=tmp_path / "classes")


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(tar_bytes(webdataset("0")))
    with pytest.raises(ValueError, match=r"x/a/0001\.jpg"):
        list_source(tmp_path, kind="webdataset")


def test_the_listing_digest_is_of_content_not_of_place(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_tree(tmp_path / place)
    first, second = (list_source(tmp_path / place) for place in ("a", "b"))
    assert first.digest() == second.digest()
    assert np.array_equal(first.records["label"], second.records["label"])
    (tmp_path / "b" / "n03" / "n03_0.JPEG").write_bytes(jpeg(99))
    assert list_source(tmp_path / "b").digest() != first.digest()
