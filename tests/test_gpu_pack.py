"""Packs for a GPU machine: what is chosen, what is zeroed, what is refused."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu_pack import __main__ as command
from benchmarks.gpu_pack.packages import read_present
from benchmarks.gpu_pack.slimming import slim, unused_files, zero_other_images
from pipelines.cli.command import run_command

PTX, CUBIN = 1, 2
IMAGES = ((PTX, 120), (CUBIN, 75), (CUBIN, 80), (CUBIN, 90), (CUBIN, 90), (CUBIN, 120))
# Stands for uv, whose index a test has no way to.
UV = """#!{python} -S
import pathlib, sys
given = dict(zip(sys.argv, sys.argv[1:]))
if sys.argv[2] == "compile":
    found = ["nvidia-dali-cuda130==2.4.0", "nvidia-nvtiff-cu13==1", "optree==0.20.0"]
    if not sys.argv[-1].endswith("dali.in"):
        found += ["ray==2.60.0", "torch==2.11.0"]
    omit = "--no-emit-package="
    found = [of for of in found if omit + of.split("=")[0] not in given]
    pathlib.Path(given["-o"]).write_text("".join(of + "\\n" for of in found))
else:
    for line in pathlib.Path(given["-r"]).read_text().split():
        folder = pathlib.Path(given["--target"], line.split("=")[0])
        (folder / "tests").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
"""


def image(kind: int, arch: int) -> bytes:
    payload = bytes([kind, arch]) * 20
    header = struct.pack("<HHIQ12xI", kind, 0x101, 64, len(payload), arch)
    return header.ljust(64, b"\x07") + payload


def container(*images: tuple[int, int]) -> bytes:
    content = b"".join(image(kind, arch) for kind, arch in images)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


def library(content: bytes, *, section: bytes = b".nv_fatbin") -> bytearray:
    """Write a 64-bit ELF file with code, GPU images and the sections' names."""
    parts = (
        b"",
        container((CUBIN, 75)),
        content,
        b"\0.text\0" + section + b"\0.names\0",
    )
    names = (0, 1, 7, 8 + len(section))
    body, table = b"", b""
    for index, (part, name) in enumerate(zip(parts, names, strict=True)):
        kind = 1 if index else 0
        place = (0, 0, 64 + len(body), len(part))
        table += struct.pack("<IIQQQQ", name, kind, *place).ljust(64, b"\0")
        body += part
    header = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", 64 + len(body))
    header = header.ljust(58, b"\0") + struct.pack("<HHH", 64, len(parts), 3)
    return bytearray(header + body + table)


@pytest.mark.parametrize(
    ("arch", "kept"),
    [
        (90, {(CUBIN, 90)}),
        (89, {(CUBIN, 80)}),
        (75, {(CUBIN, 75)}),
        (121, {(CUBIN, 120)}),
        (130, {(PTX, 120)}),
    ],
)
def test_only_images_that_the_architecture_loads_are_left(
    arch: int, kept: set[tuple[int, int]]
) -> None:
    # Padding lies between containers.
    before = library(container(*IMAGES) + bytes(8) + container(*IMAGES))
    after = bytearray(before)
    num_zeroed = zero_other_images(after, arch=arch)
    wanted = bytes(before)
    for kind, other in set(IMAGES) - kept:
        whole = image(kind, other)
        wanted = wanted.replace(whole, whole[:64] + bytes(len(whole) - 64))
    # The code holds an image too, which is none: it stays.
    wanted = wanted.replace(image(CUBIN, 75)[:64] + bytes(40), image(CUBIN, 75), 1)
    assert after == wanted
    assert num_zeroed == 2 * 40 * sum(found not in kept for found in IMAGES)


def test_images_in_the_other_section_are_found_and_unknown_kinds_stay() -> None:
    content = container((CUBIN, 80), (16, 80), (CUBIN, 90))
    after = library(content, section=b"__nv_relfatbin")
    assert zero_other_images(after, arch=90) == 40
    assert image(16, 80) in after


def test_what_is_no_library_is_left_alone() -> None:
    text = bytearray(container(*IMAGES))
    assert zero_other_images(text, arch=90) == 0
    assert text == container(*IMAGES)


def test_an_architecture_without_images_and_other_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loads, got sm_120, sm_75, .*--arch"):
        zero_other_images(library(container(*IMAGES)), arch=70)
    content = bytearray(container(*IMAGES))
    content[8:16] = struct.pack("<Q", len(content))
    with pytest.raises(ValueError, match="within their section"):
        zero_other_images(library(bytes(content)), arch=90)
    content = bytearray(container(*IMAGES))
    content[16 + 4 : 16 + 8] = struct.pack("<I", 8)
    with pytest.raises(ValueError, match="as known"):
        zero_other_images(library(bytes(content)), arch=90)


def test_present_packages_are_read_as_pip_prints_them(tmp_path: Path) -> None:
    file = tmp_path / "present.txt"
    file.write_text(
        "# of the machine\n\nPyYAML\ntorch==2.11.0+cu130\nnumpy==2.5.2  # ours\n"
        "mpi4py @ file:///build/mpi4py\n-e git+file:///src#egg=own\n"
    )
    assert read_present(file) == {
        "PyYAML": None,
        "torch": "2.11.0",
        "numpy": "2.5.2",
        "mpi4py": None,
    }
    assert read_present(command.Options().present)["torch"] == "2.11.0"
    file.write_text("Package    Version\n")
    with pytest.raises(
        ValueError, match=r"'Package    Version' in line 1 of .*pip freeze"
    ):
        read_present(file)


def test_other_pythons_and_unused_folders_are_left_out(tmp_path: Path) -> None:
    kept = (
        "a/of.cpython-312-x86_64-linux-gnu.so",
        "a/any.abi3.so",
        "ray/train/trainer.py",
        "ray/dashboard/client/build/page.js",
        "a-1.dist-info/METADATA",
    )
    left_out = (
        "a/of.cpython-312t-x86_64-linux-gnu.so",
        "a/of.cpython-311-x86_64-linux-gnu.so",
        "ray/rllib/deep/er.py",
        "ray/dashboard/client/build/page.js.map",
        "a/tests/test_it.py",
        "a-1.dist-info/RECORD",
        "bin/ray",
    )
    for name in (*kept, *left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {
        str(p.relative_to(tmp_path)) for p in unused_files(tmp_path, python="3.12")
    }
    assert found == {
        *left_out[:2],
        *(
            "ray/rllib",
            "a/tests",
            "a-1.dist-info/RECORD",
            "bin",
        ),
        "ray/dashboard/client/build/page.js.map",
    }


def programs(folder: Path, **scripts: str) -> Path:
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)
    return folder


def test_libraries_are_slimmed_and_share_the_folder_nvidia(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    tools = programs(tmp_path / "bin", strip=f'#!/bin/sh\necho "$@" >> {log}\n')
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    pack, there = tmp_path / "pack", tmp_path / "there"
    for folder, name in ((pack, "dali"), (there, "cuda")):
        (folder / "nvidia" / name).mkdir(parents=True)
        (folder / "nvidia" / "__init__.py").touch()
    file = pack / "nvidia/dali/libdali.so"
    file.write_bytes(library(container(*IMAGES)))
    slim(pack, python="3.12", arch=90)
    wanted = library(container(*IMAGES))
    zero_other_images(wanted, arch=90)
    assert file.read_bytes() == wanted
    assert log.read_text() == f"--strip-unneeded {file}\n"
    with pytest.raises(ValueError, match=r"libdali.so: .*sm_70"):
        slim(pack, python="3.12", arch=70)
    path = os.pathsep.join((str(pack), str(there)))
    subprocess.run(
        [sys.executable, "-S", "-c", "import nvidia.dali, nvidia.cuda"],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    programs(tools / "broken", strip="#!/bin/sh\necho 'no\nsuch' >&2; exit 1\n")
    monkeypatch.setenv("PATH", f"{tools / 'broken'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match="strip failed: no such"):
        slim(pack, python="3.12", arch=90)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="install binutils"):
        slim(pack, python="3.12", arch=90)


def test_the_command_builds_packs_that_tar_unpacks_and_checks_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = programs(tmp_path / "bin", uv=UV.format(python=sys.executable))
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    present = tmp_path / "present.txt"
    present.write_text("torch==2.11.0\n")
    arguments = ["--present", str(present), "--out", str(tmp_path / "out")]
    command._main(arguments)
    printed = capsys.readouterr().out
    archives = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in archives] == [
        "dali-py3.12-sm_90.tar.xz",
        "rest-py3.12.tar.xz",
    ]
    assert all(str(path) in printed for path in archives)
    contents = []
    for path in archives:
        folder = tmp_path / path.name.partition("-")[0]
        folder.mkdir()
        subprocess.run(["tar", "xf", path, "-C", folder], check=True)
        with tarfile.open(path) as archive:
            assert {(member.mtime, member.uid) for member in archive} == {(0, 0)}
        contents.append({str(p.relative_to(folder)) for p in folder.rglob("*.py")})
    assert contents == [
        {"nvidia-dali-cuda130/__init__.py", "optree/__init__.py"},
        {"ray/__init__.py"},
    ]
    first = archives[1].read_bytes()
    monkeypatch.setitem(command._MAX_MIB, "rest", 0.0)
    with pytest.raises(ValueError, match=r"expected rest within 0 MiB, got 0.0"):
        command._main(arguments)
    assert archives[1].read_bytes() == first


def test_an_index_without_the_wheels_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = programs(
        tmp_path / "bin", uv="#!/bin/sh\necho 'x no\n  wheel' >&2; exit 1\n"
    )
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    with pytest.raises(ValueError, match=r"uv failed: x no wheel; .*see --present"):
        command._main(["--out", str(tmp_path / "out")])
    (tools / "uv").unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="run `make install`"):
        command._main(["--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--python", "312"], "expected 3.11 or newer, such as 3.12, got 312"),
        (["--python", "3.9"], "expected 3.11 or newer, such as 3.12, got 3.9"),
        (["--arch", "9"], "such as 90 for sm_90, got 9"),
        (["--present", "nowhere.txt"], "got nowhere.txt, which is not there"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str],
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_pack", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(command._main, prog=command._PROG)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert wanted in said
