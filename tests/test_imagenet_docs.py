"""ImageNet as it is downloaded: docs/running.md's lines, and the devkit's files."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import evaluate, train
from pipelines.config.serialization import to_json
from pipelines.shards import command
from pipelines.shards.devkit import read_ids
from pipelines.shards.making import in_process
from pipelines.shards.matfile import read_structs
from pipelines.shards.sources import list_source
from tests.demo_runs import RECIPE
from tests.imagenet_files import (
    COLOURS,
    GROUND_TRUTH,
    NUM_TRAIN,
    OF_ID,
    WNIDS,
    devkit,
    meta_mat,
    tar_bytes,
    write_downloads,
)
from tests.mlflow_stores import prepare_store
from tests.small_runs import SO_VIT, small_run

DOCS = Path(__file__).parents[1] / "docs" / "running.md"


def typed_lines() -> list[list[str]]:
    """Read the commands of the first block of docs/running.md, as a shell would."""
    block = DOCS.read_text().split("## Prepare ImageNet-1K")[1].split("```")[1]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()[1:]]


def check_set(folder: Path, *, num_rows: int) -> None:
    """See that each row's label is the class whose colour its picture has."""
    assert json.loads((folder / "classes.json").read_text()) == WNIDS
    files = sorted(folder.glob("*.parquet"))
    rows = pa.concat_tables([pq.read_table(file) for file in files]).to_pylist()
    assert len(rows) == num_rows
    for row in rows:
        pixel = np.asarray(Image.open(io.BytesIO(row["image"])))[8, 8].astype(int)
        nearest = min(COLOURS, key=lambda wnid: abs(pixel - COLOURS[wnid]).sum())
        assert WNIDS[row["label"]] == nearest, row["key"]


def test_the_lines_of_the_docs_lead_to_an_evaluated_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # What Ray does is shown elsewhere.
    defaults = command.make_shards.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "execute", in_process)
    write_downloads(tmp_path)
    run = small_run("unset", model=SO_VIT, batch_size=12, num_epochs=1, warmup_epochs=0)
    (tmp_path / "run.json").write_text(
        to_json(dataclasses.replace(run, storage="runs"))
    )
    (tmp_path / "recipe.py").write_text(RECIPE)
    prepare_store(str(tmp_path / "runs"))
    programs = []
    for program, *words in typed_lines():
        programs.append(program)
        if program == "sovit-shards":
            with pytest.raises(SystemExit) as ended:
                command._main(words)
            assert ended.value.code == 0
        elif program == "sovit-train":
            assert words[0] == "imagenet.so_vit_14"
            train._main(["recipe.py:small", *words[1:], "--scale.num-workers", "0"])
        else:
            words[0] = re.sub(r"\d{4}", "0001", words[0])
            evaluate._main([*words, "--decoder", "torch", "--device", "cpu"])
    shards = ["sovit-shards"] * 2
    assert programs == [*shards, "sovit-train", "sovit-eval"]
    check_set(tmp_path / "shards" / "train", num_rows=3 * NUM_TRAIN)
    check_set(tmp_path / "shards" / "val", num_rows=len(GROUND_TRUTH))
    said = capsys.readouterr().out
    assert "n01440764 8, n01443537 8, n02119789 8" in said
    assert re.search(r"^top-1 \d+\.\d\d %", said, re.MULTILINE)


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    write_downloads(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(WNIDS))
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    truth = (kit / "ILSVRC2012_validation_ground_truth.txt").read_text()
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    mapping = "".join(f"{wnid} {number} fox\n" for number, wnid in OF_ID.items())
    (tmp_path / "map_clsloc.txt").write_text(mapping)
    (tmp_path / "ids.txt").write_text("".join(f"{n} {w}\n" for n, w in OF_ID.items()))
    (tmp_path / "synset_words.txt").write_text("".join(f"{w} a fox\n" for w in WNIDS))
    rows = [
        f"ILSVRC2012_val_{i:08d},{OF_ID[str(n)]} 1 2 30 40 {OF_ID[str(n)]} 3 4 5 6 \n"
        for i, n in enumerate(GROUND_TRUTH, start=1)
    ]
    table = "".join(["ImageId,PredictionString\n", *reversed(rows)])
    (tmp_path / "LOC_val_solution.csv").write_text(table)
    return tmp_path


TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KIT = "ILSVRC2012_devkit_t12"


@pytest.mark.parametrize(
    ("labels", "synsets", "classes"),
    [
        (f"{KIT}.tar.gz", None, "classes.json"),
        (f"{KIT}.tar.gz", None, "synset_words.txt"),
        (KIT, None, "classes.json"),
        (f"{KIT}/data/{TRUTH}", None, "classes.json"),  # meta.mat lies beside it
        (TRUTH, f"{KIT}.tar.gz", "classes.json"),
        (TRUTH, f"{KIT}/data/meta.mat", "classes.json"),
        (TRUTH, KIT, "classes.json"),
        (TRUTH, "ids.txt", "classes.json"),
        (TRUTH, "map_clsloc.txt", "classes.json"),
        ("LOC_val_solution.csv", None, "classes.json"),
    ],
)
def test_all_that_holds_the_labels_gives_the_same(
    labels: str, synsets: str | None, classes: str, downloads: Path
) -> None:
    listing = list_source(
        downloads / "ILSVRC2012_img_val.tar",
        labels=downloads / labels,
        synsets=None if synsets is None else downloads / synsets,
        classes_file=downloads / classes,
    )
    keys, found = (listing.records[n].to_pylist() for n in ("key", "label"))
    assert listing.classes == WNIDS
    assert keys == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)]
    assert [WNIDS[label] for label in found] == [OF_ID[str(n)] for n in GROUND_TRUTH]


@pytest.mark.parametrize(
    ("labels", "synsets", "message"),
    [
        (TRUTH, None, "--labels ILSVRC2012_devkit_t12.tar.gz"),
        (TRUTH, "synset_words.txt", r"does not say the devkit's ids"),
        (None, "synset_words.txt", "--synsets says what the ids in --labels are"),
        (TRUTH, "short.mat", "expected the devkit's meta.mat in .*short.mat"),
        ("cut_devkit.tar.gz", None, "cut_devkit.tar.gz is not a whole tar"),
        ("empty_devkit.tar.gz", None, "expected .*ground_truth.txt in .*empty"),
    ],
)
def test_what_does_not_say_the_ids_is_refused(
    labels: str | None, synsets: str | None, message: str, downloads: Path
) -> None:
    (downloads / "short.mat").write_bytes(meta_mat()[:200])
    packed = (downloads / f"{KIT}.tar.gz").read_bytes()
    (downloads / "cut_devkit.tar.gz").write_bytes(packed[:300])
    (downloads / "empty_devkit.tar.gz").write_bytes(tar_bytes({}, mode="w:gz"))
    with pytest.raises(ValueError, match=message):
        list_source(
            downloads / "ILSVRC2012_img_val.tar",
            labels=None if labels is None else downloads / labels,
            synsets=None if synsets is None else downloads / synsets,
        )


@pytest.mark.parametrize("compressed", [False, True])
def test_meta_mat_is_read_as_scipy_wrote_it(compressed: bool, tmp_path: Path) -> None:
    data = meta_mat(compressed=compressed)
    rows = read_structs(data, name="synsets", fields=("WNID", "ILSVRC2012_ID"))
    assert rows == [[wnid, number] for number, wnid in OF_ID.items()]
    (tmp_path / "meta.mat").write_bytes(data)
    assert read_ids(str(tmp_path / "meta.mat")) == OF_ID
    for cut in range(0, len(data), 17):  # no traceback, and no numbers of half a file
        try:
            found = read_structs(data[:cut], name="synsets", fields=("WNID",))
        except ValueError:
            continue
        assert found == [[wnid] for wnid in OF_ID.values()]
    for name, field in [("synset", "WNID"), ("synsets", "words2"), ("other", "WNID")]:
        with pytest.raises(ValueError, match="no struct array"):
            read_structs(data, name=name, fields=(field,))


def test_numbers_come_as_matlab_packs_them() -> None:
    """MATLAB writes whole doubles as bytes or shorts where they fit; SciPy does not."""
    data = meta_mat(compressed=False, of_id={"258": "n01440764"})
    double = np.array([258.0]).tobytes()
    packed = np.array([4 | 2 << 16, 258], "<u4").tobytes()  # two bytes of uint16
    wide = np.array([9, 8], "<u4").tobytes() + double
    assert data.count(wide) == 1
    place = data.index(wide)
    # The matrix around it, and the array around that, are as much shorter.
    shorter = bytearray(data[:place] + packed + data[place + len(wide) :])
    for start in range(128, place, 8):
        kind, size = np.frombuffer(bytes(shorter[start : start + 8]), "<u4")
        if kind == 14 and start + 8 + size >= place + len(wide) and size < len(data):
            shorter[start + 4 : start + 8] = np.array([size - 8], "<u4").tobytes()
    found = read_structs(
        bytes(shorter), name="synsets", fields=("ILSVRC2012_ID", "WNID")
    )
    assert found == [["258", "n01440764"]]


def test_a_devkit_of_ids_that_meta_mat_lacks_is_refused(tmp_path: Path) -> None:
    write_downloads(tmp_path)
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    kit.write_bytes(tar_bytes(devkit(ground_truth=[9] * 6), mode="w:gz"))
    with pytest.raises(ValueError, match=r"has the id '9', .* does not"):
        list_source(tmp_path / "ILSVRC2012_img_val.tar", labels=kit)
