"""Labels and classes from texts, as people write them, or a refusal that says why."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from pipelines.shards.classes import read_classes
from pipelines.shards.listing import Fields, Listing
from pipelines.shards.sources import list_source
from tests.imagenet_files import tar_bytes
from tests.small_sets import jpeg
from tests.understood import labels_of, parquet, samples, write, zipped

FLAT = ["img_01.jpg", "img_02.jpg", "img_10.jpg"]
NESTED = ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
WANTED = ["golden retriever", "tabby", "golden retriever"]


def label(root: Path, text: str | bytes, names: list[str], **options: Any) -> Listing:
    """List a tar of images with a text of labels, and class names if there are any."""
    files = {name: jpeg(place) for place, name in enumerate(names)}
    write(root, {"x.tar": tar_bytes(dict(reversed(files.items())))})
    data = text if isinstance(text, bytes) else text.encode()
    write(root, {"labels.csv": data})
    if "classes" in options:
        (root / "classes.txt").write_text("\n".join(options.pop("classes")))
        options["classes_file"] = root / "classes.txt"
    fields = Fields(label=options.pop("column", None))
    return list_source(
        root / "x.tar", labels=root / "labels.csv", fields=fields, **options
    )


TEXTS = {
    "commas": "{0},{3}\n{1},{4}\n{2},{5}\n",
    "other order, empty lines": "{2},{5}\n\n{0},{3}\n{1},{4}\n\n",
    "column names": "file_name,label\n{0},{3}\n{1},{4}\n{2},{5}\n",
    "a byte order mark and CRLF": "\ufeffx,class\r\n{0},{3}\r\n{1},{4}\r\n{2},{5}",
    "quotes": '"{0}","{3}"\n"{1}","{4}"\n"{2}","{5}"\n',
    "semicolons": "{0};{3}\n{1};{4}\n{2};{5}\n",
    "tabs, further columns": "{0}\t{3}\t0\n{1}\t{4}\t0\n{2}\t{5}\t9\n",
    "blanks": "{0} {3}\n{1}   {4}\n{2} {5}  \n",
    "more columns": "id,label,image\n7,{3},{0}\n8,{4},{1}\n9,{5},{2}\n",
    "folders above": "./set/{0},{3}\n./set/{1},{4}\n./set/{2},{5}\n",
    "labels of other images": "{0},{3}\n{1},{4}\n{2},{5}\nx.jpg,{3}\n",
    "the same twice": "{0},{3}\n{1},{4}\n{2},{5}\n{0},{3}\n",
    "an object": '{{"{0}": "{3}", "{1}": "{4}", "{2}": "{5}"}}',
}


@pytest.mark.parametrize("names", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("text", TEXTS)
def test_labels_go_to_the_images_that_are_named(
    text: str, names: list[str], tmp_path: Path
) -> None:
    listing = label(tmp_path, TEXTS[text].format(*names, *WANTED), names)
    assert labels_of(listing) == dict(zip(names, WANTED, strict=True))
    assert listing.classes == ["golden retriever", "tabby"]
    bare = [name.rpartition(".")[0] for name in names]
    again = label(tmp_path, TEXTS[text].format(*bare, *WANTED), names)
    assert again.digest() == listing.digest()


def test_a_label_a_line_is_in_the_order_of_the_names(tmp_path: Path) -> None:
    listing = label(tmp_path, "cat\n dog \ncat", FLAT)
    assert list(labels_of(listing).values()) == ["cat", "dog", "cat"]
    text = "golden retriever\ntabby\ngolden retriever\n"
    listing = label(tmp_path, text, FLAT, classes=sorted(set(WANTED)))
    assert list(labels_of(listing).values()) == WANTED


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("c\nd\nc\n", ["i_1.jpg", "i_2.jpg", "i_10.jpg"], "no leading zeros"),
        ("1.jpg,c\na/2.jpg,d\n", NESTED, "labels '1.jpg', and several images"),
        ("{0},c\n{0},d\n{1},c\n{2},c\n", FLAT, "name twice: 'img_01.jpg' is 'c' and"),
        ("a,c\nb,d\ne,c\nf,c\n", FLAT, "none for 'img_01.jpg' and names such as 'f'"),
        ("c\nd\n", FLAT, "expected 3 lines of one label"),
        ("{0},x,c\n{1},y,d\n{2},z,d\n", FLAT, ""),
        ("f,a,b\n{0},x,c\n{1},y,d\n{2},z,d\n", FLAT, "got f, a, b; .*--label-field"),
        ('{{"{0}": ["c"]}}', FLAT, "JSON object of labels by names"),
        ("{0},1\n{1},2\n{2},1\n", FLAT, "--count-from 1"),
        (b"\xff\xfe{\x000\x00", FLAT, "expected UTF-8 text in .*labels.csv"),
        (f"a,{'x' * 200_000}\n", FLAT, "expected 3 lines of one label"),
        ("", FLAT, "expected 3 lines of one label"),
    ],
)
def test_unclear_texts_are_refused(
    text: str | bytes, names: list[str], message: str, tmp_path: Path
) -> None:
    if isinstance(text, str):
        text = text.format(*names)
    if not message:  # the second of columns without names, which is said
        listing = label(tmp_path, text, names)
        assert listing.notes == ["labels are those of column 2 of 3"]
        assert listing.classes == ["x", "y", "z"]
        return
    with pytest.raises(ValueError, match=message) as caught:
        label(tmp_path, text, names)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("column", ["b", "3"])
def test_a_column_is_chosen(column: str, tmp_path: Path) -> None:
    text = "f,a,b\nimg_01.jpg,x,c\nimg_02.jpg,y,d\nimg_10.jpg,z,c\n"
    listing = label(tmp_path, text, FLAT, column=column)
    assert list(labels_of(listing).values()) == ["c", "d", "c"]
    with pytest.raises(ValueError, match=r"--label-field .* f, a, b, got 'e'"):
        label(tmp_path, text, FLAT, column="e")


def test_an_image_without_a_label_is_left_out_by_name(tmp_path: Path) -> None:
    names = [*FLAT, "img_11.jpg"]
    listing = label(tmp_path, "img_01.jpg,\nimg_10.jpg,c\nimg_11.jpg,d\n", names)
    assert labels_of(listing) == {"img_10.jpg": "c", "img_11.jpg": "d"}
    reasons = {item.key: item.reason for item in listing.skipped}
    assert reasons == dict.fromkeys(FLAT[:2], "no label in labels.csv")


@pytest.mark.parametrize("store", ["folder", "images", "zip"])
def test_folders_and_zips_of_images_have_labels_too(store: str, tmp_path: Path) -> None:
    start = "images/" if store == "images" else ""
    files = {f"{start}{name}": jpeg(0) for name in FLAT}
    root = write(tmp_path / "set", zipped(files) if store == "zip" else files)
    (tmp_path / "l.csv").write_text("\n".join(f"{name},c" for name in FLAT))
    listing = list_source(root, labels=tmp_path / "l.csv")
    assert labels_of(listing) == {f"{start}{name}": "c" for name in FLAT}
    assert listing.layout == "images, labelled by l.csv"


def test_numbers_count_from_what_is_said(tmp_path: Path) -> None:
    text = "".join(f"{name},{n}\n" for name, n in zip(FLAT, (2, 1, 2), strict=True))
    listing = label(tmp_path, text, FLAT, classes=["c", "d"], count_from=1)
    assert list(labels_of(listing).values()) == ["d", "c", "d"]
    three = ["c", "d", "e"]
    listing = label(tmp_path, text, FLAT, classes=three, count_from=0)
    assert list(labels_of(listing).values()) == ["e", "d", "e"]
    samples = {"0.jpg": b"", "0.cls": b"2", "1.jpg": b"", "1.cls": b"1"}
    root = write(tmp_path / "set", {"a.tar": tar_bytes(samples)})
    (tmp_path / "two").write_text("c\nd\n")
    with pytest.raises(ValueError, match="from 0 to 1, got 2; if they count from 1"):
        list_source(root, classes_file=tmp_path / "two")


LISTS = {
    "lines": "cat\ndog\n",
    "a byte order mark, CRLF, blanks": "\ufeffcat \r\n dog\t\r\n\r\n",
    "numbered lines": "1 dog\n0 cat\n",
    "numbered from 1": "1: cat\n2: dog\n",
    "a list": '["cat", "dog"]',
    "places by names": '{"dog": 1, "cat": 0}',
    "names by places": '{"1": "dog", "0": "cat"}',
    "ids and names by places": '{"0": ["cat", "house cat"], "1": ["dog", "fox dog"]}',
}


@pytest.mark.parametrize("text", LISTS)
def test_class_lists(text: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(LISTS[text])
    assert read_classes(tmp_path / "list") == ["cat", "dog"]


def test_a_list_of_wordnet_ids_with_names_is_one_of_ids(tmp_path: Path) -> None:
    text = "n01440764 tench, Tinca\nn01443537 goldfish\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(text)
    found = read_classes(tmp_path / "LOC_synset_mapping.txt")
    assert found == ["n01440764", "n01443537"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\n", "nothing on line 2"),
        ("cat\ndog\ncat\n", "'cat', a name twice"),
        ("", "no name"),
        ('["cat", null]', "other JSON"),
        ('{"cat": 0, "dog": 2}', "other JSON"),
        ('{"cat": "a"}', "other JSON"),
        ("[cat, dog]", "begins like JSON and is none"),
        (b"\xff\xfec\x00", "expected UTF-8 text"),
    ],
)
def test_unclear_class_lists_are_refused(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "list"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_classes(path)
    assert str(path) in str(caught.value)


def photos_of(*names: str) -> dict[str, bytes]:
    return {f"{name}/{i}.jpg": jpeg(i) for name in names for i in range(2)}


def test_composed_names_are_the_same_names(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "café")
    root = write(tmp_path / "set", photos_of(apart, "dog"))
    for name in ("café", apart):
        (tmp_path / "list").write_text(f"dog\n{name}\n")
        listing = list_source(root, classes_file=tmp_path / "list")
        assert listing.classes == ["dog", "café"]
        assert labels_of(listing)[f"{apart}/0.jpg"] == "café"


def test_a_subset_of_classes(tmp_path: Path) -> None:
    root = write(tmp_path / "set", photos_of("ant", "bee", "cat"))
    (tmp_path / "two").write_text("cat\nant\n")
    with pytest.raises(ValueError, match=r"1 labels .* 'bee' .*--subset"):
        list_source(root, classes_file=tmp_path / "two")
    listing = list_source(root, classes_file=tmp_path / "two", subset=True)
    assert listing.classes == ["cat", "ant"]
    assert set(labels_of(listing)) == {*photos_of("ant"), *photos_of("cat")}
    assert listing.ignored == {"of classes that --classes does not name": 2}
    assert not listing.skipped
    labels = {"0": "5", "1": "7", "2": "9"}  # names, though they are numbers
    tar = {"a.tar": tar_bytes(samples(labels))}
    (tmp_path / "two").write_text("9\n5\n")
    options = {"classes_file": tmp_path / "two", "subset": True}
    listing = list_source(write(tmp_path / "wds", tar), **options)
    assert labels_of(listing) == {"a/0.jpg": "5", "a/2.jpg": "9"}
    with pytest.raises(ValueError, match="--subset needs --classes"):
        list_source(root, subset=True)


def test_classes_of_a_set_and_of_the_user_go_together_by_name(tmp_path: Path) -> None:
    """By number they would change places in silence."""
    files = {"a.parquet": parquet([0, 1, 1], names=["cat", "dog"])}
    root = write(tmp_path / "set", files)
    (tmp_path / "list").write_text(json.dumps(["owl", "dog", "cat"]))
    listing = list_source(root, classes_file=tmp_path / "list")
    assert listing.records["label"].to_pylist() == [2, 1, 1]
    (tmp_path / "list").write_text(json.dumps(["tench", "goldfish"]))
    with pytest.raises(ValueError, match=re.escape("'cat' (classes are 'tench', ...)")):
        list_source(root, classes_file=tmp_path / "list")


def test_labels_beside_class_folders_are_refused_until_it_is_said(
    tmp_path: Path,
) -> None:
    root = write(tmp_path / "set", photos_of("ant", "bee"))
    text = "".join(f"{name},x\n" for name in photos_of("ant", "bee"))
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(ValueError, match="say --kind ilsvrc-val"):
        list_source(root, labels=tmp_path / "l.csv")
    listing = list_source(root, labels=tmp_path / "l.csv", kind="ilsvrc-val")
    assert listing.classes == ["x"]


def test_a_path_to_another_folder_names_no_image(tmp_path: Path) -> None:
    text = "z/2.jpg,c\na/1.jpg,d\nb/1.jpg,d\n"
    listing = label(tmp_path, text, NESTED)
    assert labels_of(listing) == {"a/1.jpg": "d", "b/1.jpg": "d"}
    assert [item.key for item in listing.skipped] == ["a/2.jpg"]
    assert listing.notes == ["1 labels are of no image in the source"]


def test_numbers_with_a_point_are_names_of_classes_too(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"a.parquet": parquet([5.0, 7.0])})
    (tmp_path / "list").write_text("7\n5\n")
    listing = list_source(root, classes_file=tmp_path / "list")
    assert listing.records["label"].to_pylist() == [1, 0]
