"""A folder of images becomes shards: once, found again, made anew if it changed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.data.shard_set import read_shard_set
from pipelines.shards.folder import (
    SETS_FILE,
    FolderSets,
    holds_images,
    make_folder_sets,
    plan_folder,
    sets_to_be,
)
from pipelines.storage.path import StoragePath
from tests.small_sets import jpeg

NUM_IMAGES = 12


def photos(root: Path, *names: str, num: int = NUM_IMAGES, first: int = 0) -> Path:
    """Write a folder of pictures, all different, for each class."""
    for at, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(num):
            content = jpeg(first + 100 * at + number, size=(40, 30))
            (root / name / f"{number:02d}.jpg").write_bytes(content)
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return photos(tmp_path / "my photos 100%", "cat", "dog")


def made(source: Path, **settings: object) -> FolderSets:
    plan = plan_folder(
        train=str(source),
        storage=str(source.parent / "runs"),
        **settings,  # type: ignore[arg-type]
    )
    return make_folder_sets(plan)


def keys(address: str) -> set[str]:
    return {
        key
        for path in Path(address).glob("*.parquet")
        for key in pq.read_table(path, columns=["key"])["key"].to_pylist()
    }


def in_all(source: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in source.glob("*/*.jpg")}


def test_a_folder_becomes_two_sets_and_is_found_again(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipelines")
    sets = made(source, share=0.25)
    train, val = keys(sets.train), keys(sets.val)
    assert train | val == in_all(source)
    assert not train & val
    assert sorted(key[:3] for key in val) == ["cat"] * 3 + ["dog"] * 3
    assert sets.num_train == 18
    assert (sets.num_classes, sets.short_side) == (2, 30)
    assert read_shard_set(sets.train).classes == read_shard_set(sets.val).classes
    place = Path(sets.train).parent
    assert place.parent == source.parent / "runs" / "shards"
    assert re.fullmatch(r"my-photos-100-[0-9a-f]{12}", place.name)
    assert "24 images of 2 classes (cat, dog), 12 to 12 of each" in caplog.text
    assert "held out: 6 images, 25% of each class by the seed 0" in caplog.text
    times = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    caplog.clear()
    assert made(source, share=0.25) == sets
    assert "are there: " in caplog.text
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == times


def test_what_changes_makes_another_set(source: Path) -> None:
    sets = made(source)
    assert made(source, share=0.2).train != sets.train
    assert made(source, seed=1).train != sets.train
    # A file of the same size and another time.
    file = source / "cat" / "00.jpg"
    os.utime(file, ns=(0, 1))
    touched = made(source)
    assert touched.train != sets.train
    file.unlink()
    assert keys((smaller := made(source)).train) | keys(smaller.val) == in_all(source)
    (source / "dog" / "new.jpg").write_bytes(jpeg(990, size=(40, 30)))
    larger = made(source)
    assert keys(larger.train) | keys(larger.val) == in_all(source)
    # Runs that were trained on the ones before still have them.
    assert len(keys(sets.train)) == 22


def test_copies_never_lie_on_both_sides(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipelines")
    for number in range(8):
        content = (source / "cat" / f"{number:02d}.jpg").read_bytes()
        (source / "cat" / f"copy{number}.jpg").write_bytes(content)
    sets = made(source, share=0.4)
    val = {key for key in keys(sets.val) if key.startswith("cat")}
    for number in range(8):
        assert (f"cat/{number:02d}.jpg" in val) == (f"cat/copy{number}.jpg" in val)
    assert len(val) == 8
    assert (
        "16 images are copies of one another or nearly so, in 8 groups" in caplog.text
    )


def test_a_class_of_one_image_stays_in_training(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipelines")
    photos(source, "owl", num=1, first=900)
    sets = made(source)
    assert "owl/00.jpg" in keys(sets.train)
    assert {key[:3] for key in keys(sets.val)} == {"cat", "dog"}
    assert read_shard_set(sets.val).classes == ("cat", "dog", "owl")
    assert "nothing is held out of 1 classes of one image" in caplog.text


def test_odd_files_are_left_out_by_name(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipelines")
    (source / "cat" / "notes.txt").write_text("mine")
    (source / "cat" / ".hidden.jpg").write_bytes(b"x")
    (source / "cat" / "broken.jpg").write_bytes(jpeg(1)[:50])
    (source / "cat" / "deep" / "er").mkdir(parents=True)
    (source / "cat" / "deep" / "er" / "a b%20.jpg").write_bytes(jpeg(991))
    (source / "empty").mkdir()
    sets = made(source)
    assert "cat/deep/er/a b%20.jpg" in keys(sets.train) | keys(sets.val)
    assert len(keys(sets.train) | keys(sets.val)) == 25
    assert read_shard_set(sets.train).classes == ("cat", "dog", "empty")
    assert "no image in 1 of 3 classes: 'empty'" in caplog.text
    assert "train: 1 images left out, named in" in caplog.text
    report = json.loads((Path(sets.train) / "report.json").read_text())
    assert [item["key"] for item in report["skipped"]] == ["cat/broken.jpg"]


def test_its_own_parts_are_taken_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipelines")
    source = tmp_path / "photos"
    photos(source / "train", "cat", "dog")
    photos(source / "val", "cat", "dog", num=3, first=500)
    photos(source / "test", "cat", num=1, first=700)
    copied = source / "train" / "cat" / "00.jpg"
    shutil.copy(copied, source / "val" / "cat" / "the same.jpg")
    sets = made(source)
    assert keys(sets.train) == in_all(source / "train")
    assert keys(sets.val) == in_all(source / "val")
    assert "its train is trained on, its val held out" in caplog.text
    assert "test is left alone" in caplog.text
    assert "1 held-out images are trained on too" in caplog.text
    assert "'cat/the same.jpg' is like 'cat/00.jpg'" in caplog.text
    with pytest.raises(ValueError, match=r"leave out --data\.val-share, or set"):
        made(source, share=0.1)
    shutil.rmtree(source / "val")
    with pytest.raises(ValueError, match=r"--data\.train \S+/train with --data\.val"):
        made(source)
    # Nothing is to be held out: a part is not named, so neither is taken.
    with pytest.raises(ValueError, match="holds the splits test, train"):
        made(source, holds_out=False)


def test_held_out_folders_have_the_classes_of_the_other(tmp_path: Path) -> None:
    train = photos(tmp_path / "a", "cat", "dog")
    val = photos(tmp_path / "b", "dog", num=2, first=500)
    sets = made(train, val=str(val))
    assert read_shard_set(sets.val).classes == ("cat", "dog")
    assert len(keys(sets.train)) == 24
    plan = plan_folder(
        train="", val=str(val), classes=["dog", "eel"], storage=str(tmp_path / "runs")
    )
    alone = make_folder_sets(plan)
    assert alone.train == ""
    assert read_shard_set(alone.val).classes == ("dog", "eel")


def test_nothing_is_held_out_where_nothing_is_to_be(source: Path) -> None:
    sets = made(source, holds_out=False)
    assert (sets.val, sets.num_train) == ("", 24)


def test_a_folder_in_a_bucket_is_one_too(source: Path, tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/photos"
    for path in source.rglob("*.jpg"):
        name = f"{path.parent.name}/{path.name}"
        StoragePath(f"{address}/{name}").write(path.read_bytes())
    assert holds_images(address)
    plan = plan_folder(train=address, storage=str(tmp_path / "runs"))
    sets = make_folder_sets(plan)
    here = made(source)
    assert (keys(sets.train), keys(sets.val)) == (keys(here.train), keys(here.val))
    assert plan_folder(train=address, storage=str(tmp_path / "runs")).found() == sets


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        (["a.jpg", "b.jpg"], "a folder a class.*--labels.*options of sovit-shards"),
        (["cat/a.jpg", "cat/b.jpg"], "at least 2 classes"),
        (["x/cat/a.jpg", "x/dog/b.jpg"], "take what is in it"),
        (["cat/a.txt", "dog/b.txt"], "got none"),
        (["train/a.jpg", "val/b.jpg"], "a folder a class in .*train"),
        (["dev/cat/a.jpg", "train/cat/a.jpg"], "holds the splits"),
    ],
)
def test_what_could_be_two_things_is_refused(
    files: list[str], refused: str, tmp_path: Path
) -> None:
    for number, name in enumerate(files):
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(number))
    with pytest.raises(ValueError, match=refused) as error:
        made(tmp_path / "source")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    for name in ("cat/a.jpg", "dog/b.jpg"):
        (tmp_path / "source" / name).parent.mkdir(parents=True)
        (tmp_path / "source" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="got files that are none"):
        made(tmp_path / "source")


def test_images_that_are_all_alike_leave_nothing_to_hold_out(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "source" / name / f"{number}.jpg").write_bytes(jpeg(1))
    with pytest.raises(ValueError, match=r"set --validation\.no-held-out"):
        made(tmp_path / "source")


def test_storage_within_the_images_is_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="set --storage"):
        plan_folder(train=str(source), storage=str(source / "runs"))


def test_what_would_be_made_is_said_without_making_it(source: Path) -> None:
    storage = source.parent / "runs"
    plan = plan_folder(train=str(source), storage=str(storage))
    sets, lines = sets_to_be(plan)
    assert sets.num_train == 22
    assert any("held out: 2 images" in line for line in lines)
    assert not storage.exists()
    assert made(source) == sets


def test_work_that_was_cut_off_goes_on(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.shards import folder

    def cut(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_json", cut)
    with pytest.raises(KeyboardInterrupt):
        made(source)
    monkeypatch.undo()
    assert (
        plan_folder(train=str(source), storage=str(source.parent / "runs")).found()
        is None
    )
    sets = made(source)
    assert len(keys(sets.train) | keys(sets.val)) == 24
    # One that is damaged is made once more.
    (Path(sets.train).parent / SETS_FILE).write_text("{")
    assert made(source) == sets


def test_what_is_a_set_is_told_from_what_are_images(
    source: Path, tmp_path: Path
) -> None:
    sets = made(source)
    assert holds_images(str(source))
    assert not holds_images(sets.train)
    assert not holds_images("")
    assert not holds_images(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert not holds_images(str(tmp_path / "empty"))
