"""Doors in tars: members that point elsewhere are refused, and nothing is unpacked."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path

import pytest

from pipelines.shards.command import Arguments, make_shards
from pipelines.shards.making import in_process
from pipelines.shards.sources import Kind, list_source
from pipelines.shards.tars import scan_tar
from tests.small_sets import jpeg

ABSOLUTE = ["/etc/passwd", "//etc/passwd"]
CLIMBING = ["../up.jpg", "a/../../up.jpg", "..", "a/.."]
SPECIAL = {
    "a link": tarfile.SYMTYPE,
    "a hard link": tarfile.LNKTYPE,
    "a pipe": tarfile.FIFOTYPE,
    "a disk": tarfile.BLKTYPE,
    "a terminal": tarfile.CHRTYPE,
}


def file(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def special(name: str, kind: bytes, *, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def tar_of(
    path: Path,
    members: list[tuple[tarfile.TarInfo, bytes]],
    *,
    form: int = tarfile.PAX_FORMAT,
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def good(number: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Give a WebDataset sample."""
    name = f"{number:04d}"
    return [file(f"{name}.jpg", jpeg(number)), file(f"{name}.cls", b"0")]


def listed(path: Path, kind: Kind, tmp_path: Path) -> object:
    labels = tmp_path / "labels.txt"
    labels.write_text("0\n" * 2)
    is_val = kind == "ilsvrc-val"
    return list_source(path, kind=kind, labels=labels if is_val else None)


KINDS: list[Kind] = ["webdataset", "ilsvrc-train", "ilsvrc-val"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("name", [*ABSOLUTE, *CLIMBING])
@pytest.mark.parametrize("kind", KINDS)
def test_a_member_that_points_elsewhere_is_refused_by_name(
    kind: Kind, name: str, is_folder: bool, form: int, tmp_path: Path
) -> None:
    bad = special(name, tarfile.DIRTYPE) if is_folder else file(name, jpeg(1))
    path = tar_of(tmp_path / "x.tar", [*good(0), bad], form=form)
    with pytest.raises(ValueError, match="absolute or hold") as caught:
        listed(path, kind, tmp_path)
    assert f"holds the member {bad[0].name!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_so_is_one_within_a_tar_of_tars(tmp_path: Path) -> None:
    inner = tar_of(tmp_path / "in.tar", [file("../up.jpg", jpeg(1))]).read_bytes()
    outer = tar_of(tmp_path / "x.tar", [file("n01.tar", inner)])
    with pytest.raises(ValueError, match=r"holds the member '\.\./up\.jpg'"):
        list_source(outer)
    outer = tar_of(tmp_path / "y.tar", [file("../n01.tar", inner)])
    with pytest.raises(ValueError, match=r"holds the member '\.\./n01\.tar'"):
        list_source(outer)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../etc/passwd", "0000.jpg"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_links_and_devices_are_left_out_by_name(
    kind: str, target: str, tmp_path: Path
) -> None:
    bad = special("0001.jpg", SPECIAL[kind], link=target)
    path = tar_of(tmp_path / "x.tar", [*good(0), bad])
    listing = list_source(path, kind="webdataset")
    assert listing.records["key"].to_pylist() == ["x/0000.jpg"]
    skipped = {item.key: item.reason for item in listing.skipped}
    assert skipped == {"0001.jpg": "not a plain file in its tar"}


def test_nothing_is_unpacked(tmp_path: Path) -> None:
    """Members are read where they lie: the set is all that is written."""
    odd = special("0001.jpg", tarfile.SYMTYPE, link="/etc/passwd")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    path = tar_of(source / "x.tar", [*good(0), odd, *good(2)])
    make_shards(Arguments(path, str(out), num_shards=2), execute=in_process)
    names = {item.relative_to(tmp_path).as_posix() for item in tmp_path.rglob("*")}
    shards = {f"out/out-{number:05d}-of-00002.parquet" for number in range(2)}
    kept = {"out/classes.json", "out/report.json", "out/_plan.json"}
    assert names == {"source", "source/x.tar", "out", *shards, *kept}
    assert "0001.jpg" in (out / "report.json").read_text()


def test_a_member_of_negative_size_ends_the_listing(tmp_path: Path) -> None:
    """CVE-2025-8194: the next member would be the same again, for ever."""
    path = tar_of(tmp_path / "x.tar", good(0), form=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[124:136] = (-1024).to_bytes(12, "big", signed=True)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    # No more than it has: without the check it goes round.
    with pytest.raises(ValueError, match=r"x\.tar is damaged within '0000\.jpg'"):
        list(itertools.islice(scan_tar(path), 3))


def test_a_label_that_is_nested_without_end_costs_its_sample(tmp_path: Path) -> None:
    members = [*good(0), file("0001.jpg", jpeg(1)), file("0001.json", b"[" * 200_000)]
    listing = list_source(tar_of(tmp_path / "x.tar", members), kind="webdataset")
    assert listing.records["key"].to_pylist() == ["x/0000.jpg"]
    assert [item.reason for item in listing.skipped] == ["its .json cannot be read"]
