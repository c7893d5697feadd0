"""What sovit-shards says of a source, and that one bad file costs that file alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.shards import listing as listing_module
from pipelines.shards.command import Arguments, _conclude, make_shards, on_ray
from pipelines.shards.making import in_process
from pipelines.shards.planning import Done
from pipelines.storage.path import StoragePath
from tests.imagenet_files import tar_bytes
from tests.small_sets import jpeg
from tests.understood import classes, parquet, samples, tars, write, zipped

CAT_DOG = ["cat", "dog"]


def make(source: Path | str, out: Path, *, execute: Any = in_process, **options: Any):
    arguments = Arguments(source, str(out), num_shards=2, **options)
    return make_shards(arguments, execute=execute)


def rows_of(out: Path) -> dict[str, bytes]:
    tables = [pq.read_table(path) for path in sorted(out.glob("*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist()
    return {row["key"]: row["image"] for row in rows}


def read_report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_what_was_understood_is_printed_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    files = classes("cat", "dog") | classes("owl", num=1)
    files |= {f"fox/{i}.heic": b"%d ftypheic" % i for i in range(3)}
    files |= {"cat/cut.jpg": jpeg(1)[:-40], "cat/.DS_Store": b"", "cat/a.xml": b""}
    out = tmp_path / "out"
    summary = make(write(tmp_path / "set", files), out)
    assert _conclude(summary, max_bad_share=0.5) == 0
    assert _conclude(summary, max_bad_share=0.4) == 1
    text, errors = capsys.readouterr()
    assert text.splitlines()[:5] == [
        f"source    class folders: {tmp_path / 'set'}",
        "classes   4, with their images: cat 2, dog 2, fox 0, owl 1",
        f"rows      5 rows in 2 shards in {out}",
        "left out  4 images: 3 not an image in a known format (.heic), "
        "1 does not decode (.jpg)",
        "ignored   2: 1 hidden files, or a system's own, 1 other files (.xml)",
    ]
    assert "44.44% of the images were left out" in errors
    assert [record.message for record in caplog.records if record.levelno > 20] == [
        "warning: no image in 1 of 4 classes: 'fox'",
        "warning: 44% of the images were left out: 3 not an image in a known format "
        "(.heic), 1 does not decode (.jpg)",
    ]
    report = read_report(out)
    counts = [["cat", 2], ["dog", 2], ["fox", 0], ["owl", 1]]
    assert report["classes"] == counts
    assert report["ignored"] == {
        "hidden files, or a system's own": 1,
        "other files (.xml)": 1,
    }
    assert {item["key"] for item in report["skipped"]} == {
        "cat/cut.jpg",
        *(f"fox/{i}.heic" for i in range(3)),
    }
    again = make(tmp_path / "set", out)
    assert (again.was_finished, again.report) == (True, report)


def test_litter_changes_nothing_of_a_set_that_is_made(tmp_path: Path) -> None:
    source, out = write(tmp_path / "set", classes("cat", "dog")), tmp_path / "out"
    make(source, out)
    write(source, {"cat/.DS_Store": b"x", ".git/config": b"x", "dog/a.txt": b"x"})
    assert make(source, out).was_finished


def test_a_report_of_before_is_still_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "set", classes("cat", "dog")), tmp_path / "out"
    make(source, out)
    report = {name: read_report(out)[name] for name in ("digest", "skipped")}
    report |= {"num_rows": 4, "num_skipped": 0}
    (out / "report.json").write_text(json.dumps(report))
    assert _conclude(make(source, out), max_bad_share=0) == 0
    assert "rows      4 rows in 2 shards" in capsys.readouterr().out


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, *, function: str) -> None:
    """Let one file or folder be closed to us, as it is for those who are not root."""
    owner: Any = os if function == "scandir" else Path
    real = getattr(owner, function)

    def ask(place: Any, *args: Any) -> Any:
        if Path(place).name == name:
            raise PermissionError(13, "Permission denied", str(place))
        return real(place, *args)

    monkeypatch.setattr(owner, function, ask)


@pytest.mark.parametrize("name", ["dog", "deep"])
def test_a_folder_that_cannot_be_read_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = classes("cat", "dog") | {"cat/deep/0.jpg": jpeg(0)}
    source = write(tmp_path / "set", files)
    refusing(monkeypatch, name, function="scandir")
    with pytest.raises(ValueError, match=rf"{name}, got 'Permission denied'; make it"):
        make(source, tmp_path / "out")


def test_a_file_that_cannot_be_read_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "set", classes("cat", "dog"))
    refusing(monkeypatch, "1.jpg", function="read_bytes")
    summary = make(source, tmp_path / "out")
    assert summary.done == Done(num_rows=2, num_skipped=2)
    reasons = {item["key"]: item["reason"] for item in summary.report["skipped"]}
    denied = "cannot be read: Permission denied"
    assert reasons == {"cat/1.jpg": denied, "dog/1.jpg": denied}


def test_names_that_are_not_utf8_cost_what_has_them(tmp_path: Path) -> None:
    source = write(tmp_path / "set", classes("cat", "dog"))
    for name in (b"caf\xe9/0.jpg", b"cat/caf\xe9.jpg"):
        path = os.path.join(os.fsencode(source), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(jpeg(1))
    report = make(source, tmp_path / "out").report
    assert [name for name, _ in report["classes"]] == CAT_DOG
    assert {item["key"]: item["reason"] for item in report["skipped"]} == {
        r"caf\xe9": "the folder's name is not UTF-8",
        r"cat/caf\xe9.jpg": "name is not UTF-8",
    }
    inner = {"caf\udce9.tar": b"", "cat.tar": tar_bytes({"0.jpg": jpeg(0)})}
    (tmp_path / "x.tar").write_bytes(tar_bytes(inner))
    report = make(tmp_path / "x.tar", tmp_path / "out2").report
    assert [item["key"] for item in report["skipped"]] == [r"caf\xe9.tar"]


def test_links_are_followed_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "set", classes("cat", "dog"))
    write(tmp_path / "pool", {"a.jpg": jpeg(7)})
    (source / "kitten").symlink_to(source / "cat")
    (source / "dog" / "up").symlink_to(source)
    for name in ("x", "y"):
        (source / "dog" / name).symlink_to(tmp_path / "pool")
    report = make(source, tmp_path / "out").report
    assert report["classes"] == [["cat", 2], ["dog", 3], ["kitten", 2]]
    assert report["ignored"] == {"links to a folder above": 1}
    assert "cat and kitten are the same folder" in caplog.text
    (skipped,) = report["skipped"]
    assert skipped["key"] == "dog/y"
    assert skipped["reason"] == "a link to a folder that is listed already"


def test_what_is_too_large_for_an_image_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_module, "MAX_IMAGE_BYTES", 2 << 20)
    source = write(tmp_path / "set", classes("cat", "dog"))
    write(source, {"cat/film.mov": bytes(3 << 20)})
    (skipped,) = make(source, tmp_path / "out").report["skipped"]
    assert skipped["reason"] == "3 MB are no image"


@pytest.mark.parametrize("kind", ["folder", "tar", "cut"])
def test_a_source_that_changes_is_no_passing_failure(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = classes("cat", "dog")
    source = tmp_path / "set" if kind == "folder" else tmp_path / "set" / "x.tar"
    write(tmp_path / "set", files if kind == "folder" else tars(x=files))
    gone = tmp_path / "set" / ("cat/0.jpg" if kind == "folder" else "x.tar")
    whole = gone.read_bytes()

    def lose(task: Any, indices: Sequence[int]) -> Any:
        if kind == "cut":
            gone.write_bytes(whole[:1200])
        else:
            gone.unlink()
        return in_process(task, indices)

    out = tmp_path / "out"
    with pytest.raises(ValueError, match=rf"{gone} is .*--overwrite") as caught:
        make(source, out, execute=lose)
    assert "goes on from here" not in str(caught.value)
    gone.write_bytes(whole)
    assert make(source, out).done.num_rows == 4
    if kind == "folder":  # what is advised otherwise
        gone.unlink()
        assert make(source, out, overwrite=True).done.num_rows == 3


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, r"the same command goes on from here$"),
        ({"overwrite": True}, r"command without --overwrite goes on from here$"),
    ],
)
@pytest.mark.parametrize("error", [OSError(5, "I/O error"), KeyboardInterrupt()])
def test_where_work_goes_on_it_is_said_how(
    options: dict[str, Any], advice: str, error: BaseException, tmp_path: Path
) -> None:
    source, out = write(tmp_path / "set", classes("cat", "dog")), tmp_path / "out"

    def fail(task: Any, indices: Sequence[int]) -> Any:
        yield task(indices[0])
        raise error

    with pytest.raises(type(error), match=advice):
        make(source, out, execute=fail, **options)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(kept) == 1
    assert make(source, out).done.num_rows == 4
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_before_work_begins_nothing_is_to_go_on(tmp_path: Path) -> None:
    source = write(tmp_path / "set", classes("cat", "dog"))
    with pytest.raises(ValueError, match="There is no") as caught:
        make(source, tmp_path / "out", classes=tmp_path / "gone")
    assert "goes on" not in str(caught.value)


PLAIN = classes("cat", "dog")
STORES = {
    "folder": PLAIN,
    "tars": tars(cat={"0.jpg": jpeg(0)}, dog={"0.jpg": jpeg(1)}),
    "WebDataset": tars(a=samples({"0": "cat", "1": "dog"})),
    "Parquet": {"a.parquet": parquet(["cat", "dog"])},
    "zip": zipped(PLAIN),
    "zip, stored": zipped(PLAIN, method=0),
}


@pytest.mark.parametrize("store", STORES)
def test_a_source_in_a_bucket_gives_the_same_set(store: str, tmp_path: Path) -> None:
    files = STORES[store]
    address = f"memory://{tmp_path.name}-{re.sub('[^a-z]', '', store.lower())}/images"
    for name, data in files.items():
        StoragePath(f"{address}/{name}").write(data)
    here, there = tmp_path / "a" / "set", tmp_path / "b" / "set"
    make(write(tmp_path / "images", files), here)
    summary = make(address, there)
    assert summary.report["source"][0].startswith(address)
    for name in ("set-00000-of-00002.parquet", "set-00001-of-00002.parquet"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    images = list(rows_of(there).values())
    assert sorted(images) == sorted(set(PLAIN.values()) if len(images) == 4 else images)
    assert all(image in PLAIN.values() for image in images)
    with pytest.raises(ValueError, match="OUT is within the source"):
        make_shards(Arguments(address, f"{address}/new"), execute=in_process)


def test_a_file_that_is_damaged_in_a_zip_costs_that_file(tmp_path: Path) -> None:
    big = {f"cat/{i}.jpg": jpeg(i, size=(200, 200)) for i in range(3)}
    content = bytearray(zipped(big)["set.zip"])
    place = content.index(b"cat/1.jpg") + len("cat/1.jpg")
    content[place : place + 8] = b"\xff" * 8
    (tmp_path / "set.zip").write_bytes(content)
    summary = make(tmp_path / "set.zip", tmp_path / "out")
    (skipped,) = summary.report["skipped"]
    assert skipped["key"] == "cat/1.jpg"
    assert skipped["reason"] == "damaged in its zip"
    assert skipped["source"].startswith(f"{tmp_path / 'set.zip'}, byte ")
    assert rows_of(tmp_path / "out") == {k: v for k, v in big.items() if "1" not in k}


def test_the_columns_that_are_named_are_read(tmp_path: Path) -> None:
    images = [jpeg(i) for i in range(4)]
    columns = {"image": images[2:], "img": images[:2], "label": [0, 0], "y": [1, 0]}
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "out"
    fields = {"image_field": "img", "label_field": "y"}
    summary = make(tmp_path / "a.parquet", out, **fields)
    assert summary.report["classes"] == [["0", 1], ["1", 1]]
    assert sorted(rows_of(out).values()) == sorted(images[:2])
    # Another column of as many bytes is another set.
    pair = {"image": images[:2], "img": images[1::-1], "label": [0, 1]}
    pq.write_table(pa.table(pair), tmp_path / "b.parquet")
    make(tmp_path / "b.parquet", tmp_path / "b")
    with pytest.raises(ValueError, match="another source or other options"):
        make(tmp_path / "b.parquet", tmp_path / "b", image_field="img")


@pytest.mark.ray
def test_a_task_of_ray_says_whether_its_failure_may_pass(ray_local: None) -> None:
    def fail(index: int) -> Done:
        raise ValueError("photo.jpg is gone")

    with pytest.raises(ValueError, match=r"^photo\.jpg is gone$"):
        list(on_ray(fail, [0]))
