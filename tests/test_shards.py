"""Shard sets: every image once, in a seeded order, whatever interrupts the work."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.shard_set import SCHEMA
from pipelines.shards.command import Arguments, main, make_shards, on_ray
from pipelines.shards.making import Summary, in_process
from pipelines.shards.planning import Done

NUM_GOOD = 30


def jpeg(value: int, *, size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 90, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for i in range(NUM_GOOD):
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
    (root / "class1" / "cut.jpg").write_bytes(jpeg(1, size=(200, 200))[:-9])
    (root / "class2" / "notes.txt").write_text("no image")
    (root / "stray.jpg").write_bytes(jpeg(0))
    return root


def make(source: Path, out: Path, **options) -> Summary:
    arguments = Arguments(source=source, out=out, **options)
    return make_shards(arguments, execute=in_process)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def read_rows(out: Path) -> list[dict]:
    paths = sorted(out.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in paths]).to_pylist()


def check_set(out: Path, *, source: Path, num_shards: int) -> None:
    """Hold a set against the source: original bytes, right labels, no row twice."""
    shards = sorted(path.name for path in out.glob("*.parquet"))
    total = f"of-{num_shards:05d}.parquet"
    assert shards == [f"{out.name}-{i:05d}-{total}" for i in range(num_shards)]
    rows = read_rows(out)
    wanted = {f"class{i % 3}/{i:02d}.jpg": i % 3 for i in range(NUM_GOOD)}
    assert len(rows) == NUM_GOOD
    assert {row["key"]: row["label"] for row in rows} == wanted
    for row in rows:
        assert row["image"] == (source / row["key"]).read_bytes()
        assert (row["width"], row["height"]) == (24, 16)
    classes = json.loads((out / "classes.json").read_text())
    assert classes == ["class0", "class1", "class2"]
    # Nothing is left of the work but the plan.
    others = {p.name for p in out.iterdir()} - set(shards)
    assert others == {"classes.json", "report.json", "_plan.json"}


def test_a_set_holds_every_image_once_and_reports_the_rest(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "train"
    summary = make(source, out, num_shards=4)
    assert summary.done == Done(num_rows=NUM_GOOD, num_skipped=2)
    check_set(out, source=source, num_shards=4)
    for path in out.glob("*.parquet"):
        assert pq.read_schema(path).equals(SCHEMA)
    report = json.loads((out / "report.json").read_text())
    assert (report["num_rows"], report["num_skipped"]) == (NUM_GOOD, 2)
    cut, stray = report["skipped"]
    assert cut["key"] == "class1/cut.jpg"
    assert cut["source"] == str(source / "class1" / "cut.jpg")
    assert cut["reason"].startswith("does not decode: ")
    assert report["ignored"] == {"other files (.txt)": 1}  # no bad image
    assert stray["reason"] == "not within a class's folder"


def test_same_seed_same_bytes_other_seed_other_order(
    source: Path, tmp_path: Path
) -> None:
    for run, seed in [("a", 1), ("b", 1), ("c", 2)]:
        make(source, tmp_path / run / "set", num_shards=3, seed=seed)
    a, b, c = (tmp_path / run / "set" for run in "abc")
    assert files(a) == files(b)
    orders = [[row["key"] for row in read_rows(out)] for out in (a, c)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_other_sources_give_the_same_images(
    source: Path, tmp_path: Path, kind: str
) -> None:
    make(source, tmp_path / "train", num_shards=2)
    wanted = {(r["image"], r["label"]) for r in read_rows(tmp_path / "train")}
    if kind == "parquet":
        rows = read_rows(tmp_path / "train")
        images = [{"bytes": row["image"], "path": row["key"]} for row in rows]
        labels = [row["label"] for row in rows]
        other = tmp_path / "train.parquet"
        table = pa.table({"image": [*images, None], "label": [*labels, 0]})
        pq.write_table(table, other, row_group_size=7)
    else:
        other = tmp_path / "tars"
        other.mkdir()
        for folder in sorted(source.glob("class*")):
            command = ["tar", "-cf", other / f"{folder.name}.tar", "-C", folder, "."]
            subprocess.run(command, check=True)
    out = tmp_path / "val"
    summary = make(other, out, num_shards=3, classes=tmp_path / "train")
    assert {(r["image"], r["label"]) for r in read_rows(out)} == wanted
    assert summary.done.num_rows == NUM_GOOD
    report = json.loads((out / "report.json").read_text())
    assert len(report["skipped"]) == 1
    assert not (out / "_unpacked").exists()


def test_a_set_is_a_source(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "train", num_shards=2)
    out = tmp_path / "again"
    make(tmp_path / "train", out, num_shards=5, classes=tmp_path / "train")
    check_set(out, source=source, num_shards=5)


def test_shrinking_changes_only_large_images(source: Path, tmp_path: Path) -> None:
    (source / "class0" / "large.jpg").write_bytes(jpeg(7, size=(90, 60)))
    make(source, tmp_path / "small", short_side=20, quality=80)
    rows = {row["key"]: row for row in read_rows(tmp_path / "small")}
    large = rows.pop("class0/large.jpg")
    assert (large["width"], large["height"]) == (30, 20)
    assert Image.open(io.BytesIO(large["image"])).size == (30, 20)
    for key, row in rows.items():
        assert row["image"] == (source / key).read_bytes()


@pytest.mark.parametrize(
    "option",
    [{"num_shards": 0}, {"rows_per_group": 0}, {"quality": 0}, {"short_side": -1}],
)
def test_impossible_options_are_refused(source: Path, tmp_path: Path, option) -> None:
    with pytest.raises(ValueError, match="expected"):
        make(source, tmp_path / "train", **option)
    assert not (tmp_path / "train").exists()


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["sovit-shards", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_user_errors_are_one_line_and_exit_code_2(
    source: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out, gone = tmp_path / "out", tmp_path / "gone"
    bad = [(gone, out), (source, source / "new"), (source, out, "--classes", gone)]
    for words in bad:
        assert run_main(monkeypatch, *words) == 2
        message = capsys.readouterr().err
        assert message.startswith("sovit-shards: ")
        assert message.count("\n") == 1
    assert run_main(monkeypatch, source, out, "--kind", "zip") == 2
    assert not out.exists()


def test_too_many_bad_images_exit_with_1(
    source: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"
    make(source, out)  # so that no Ray is needed below
    assert run_main(monkeypatch, source, out) == 0
    assert "finished before" in capsys.readouterr().out
    assert run_main(monkeypatch, source, out, "--max-bad-share", "0.05") == 1
    assert "6.25% of the images" in capsys.readouterr().err
    bad = tmp_path / "bad"
    (bad / "class0").mkdir(parents=True)
    (bad / "class0" / "x.jpg").write_bytes(b"x")
    assert make(bad, out / "bad").done == Done(num_rows=0, num_skipped=1)
    assert run_main(monkeypatch, bad, out / "bad") == 1


@pytest.mark.ray
def test_ray_makes_the_same_set(source: Path, tmp_path: Path, ray_local) -> None:
    make(source, tmp_path / "a" / "train", num_shards=4)
    arguments = Arguments(source=source, out=tmp_path / "train", num_shards=4)
    make_shards(arguments, execute=on_ray)
    assert files(tmp_path / "train") == files(tmp_path / "a" / "train")


@pytest.mark.ray
def test_a_file_that_vanishes_is_a_plain_error(tmp_path: Path, ray_local) -> None:
    def fail(index: int) -> Done:
        raise FileNotFoundError("photo.jpg is gone")

    with pytest.raises(OSError, match=r"^photo\.jpg is gone$"):
        list(on_ray(fail, [0, 1]))
