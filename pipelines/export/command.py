"""Export a trained model: `sovit-export CHECKPOINT OUT`.

    sovit-export runs/demo-1/epoch_0008 exported --images shards/val
    sovit-export runs/demo-1/epoch_0008 exported --formats timm --weights raw
    sovit-export s3://bucket/runs/demo-1/epoch_0008 exported --formats onnx

timm: `model.safetensors` and `config.json`. torch: `model.pt2`, of torch.export.
onnx: `model.onnx`. Each is loaded again and held against the model, on random pixels
and, with --images, on real ones; OUT is there whole or not at all. docs/using.md says
how each is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import Tensor

from pipelines.checkpoints.manifest import load_model_code
from pipelines.cli.command import parse, run_command
from pipelines.export import checks, onnx_file, program, timm_folder
from pipelines.export.folder import mark, whole_folder
from pipelines.export.images import decode, read_images
from pipelines.export.subject import Subject, Weights, card, from_checkpoint
from pipelines.transforms.headers import BadImageError

logger = logging.getLogger(__name__)
_PROG = "sovit-export"
Format = Literal["timm", "torch", "onnx"]
_FILES = {
    "timm": (timm_folder.WEIGHTS, timm_folder.CONFIG, timm_folder.README),
    "torch": (program.PROGRAM,),
    "onnx": (onnx_file.ONNX, f"{onnx_file.ONNX}.data"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is exported, into what, and how it is checked."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or bucket address that sovit-train printed."""
    out: tyro.conf.Positional[str]
    """Folder to write; an earlier export in it is replaced, anything else refused."""
    formats: tuple[Format, ...] = ("timm", "torch", "onnx")
    weights: Weights = "auto"
    """auto takes the moving average where the checkpoint has one."""
    code: str = ""
    """Recipe file that registers the checkpoint's model, where that is your own and the
    run is none that you trained here; it is run."""
    images: tuple[str, ...] = ()
    """Files, folders or shards whose pixels the exported model is tried on too."""
    num_images: int = 32
    """How many of these images, at most."""
    tolerance: float = 1e-4
    """Largest difference of logits from the model's that is allowed, in parts of the
    largest logit, or of 1 where that is larger."""

    def check(self) -> None:
        """Raise ValueError for invalid options."""
        if not self.formats:
            raise ValueError("formats: expected timm, torch or onnx, got none")
        if self.num_images < 1 or self.tolerance < 0:
            raise ValueError(
                "expected num_images of at least 1 and tolerance of at least 0, got "
                f"{self.num_images} and {self.tolerance}"
            )
        if "://" in self.out:
            raise ValueError(
                f"expected a folder of this machine to export into, got {self.out!r}; "
                "export here and copy the folder"
            )
        if "onnx" in self.formats:
            onnx_file.check_installed()


def export_checkpoint(options: Options) -> dict[str, dict[str, Any]]:
    """Export a checkpoint's model, and check each format against it.

    Returns, for each format, its files, the largest difference of logits for each kind
    of pixels, and for onnx the version of its operators.

    Raises ValueError where the checkpoint or OUT can't be used, a format can't hold the
    model, or a difference is above the tolerance: nothing is written then.
    """
    options.check()
    with whole_folder(Path(options.out)) as folder:
        load_model_code(options.checkpoint, given=options.code)
        subject = from_checkpoint(options.checkpoint, weights=options.weights)
        images = _pixels(subject, options=options)
        cases = checks.make_cases(
            subject.model, img_size=subject.img_size, images=images
        )
        written = _write(folder, subject, cases=cases, options=options)
        if "timm" in written and timm_folder.needs_sovit(subject):
            written["timm"]["needs"] = "sovit"
        mark(folder, content={"card": card(subject), "formats": written})
    return written


def _pixels(subject: Subject, *, options: Options) -> list[Tensor]:
    """Decode the first valid images."""
    pixels: list[Tensor] = []
    for image in read_images(options.images):
        if len(pixels) == options.num_images:
            break
        try:
            pixels.append(decode(image, data=subject.data, img_size=subject.img_size))
        except BadImageError as error:
            logger.warning("%s left out: %s", image.name, error)
    if options.images and not pixels:
        raise ValueError(
            f"images: expected one that decodes, got none in {options.images}"
        )
    return pixels


def _write(
    folder: Path, subject: Subject, *, cases: checks.Cases, options: Options
) -> dict[str, dict[str, Any]]:
    """Write the formats, load each again, and check it."""
    wanted, about, opset = set(options.formats), card(subject), 0
    loaded: dict[str, Callable[[Tensor], Tensor]] = {}
    if "timm" in wanted:
        timm_folder.write_timm(folder, subject)
        loaded["timm"] = timm_folder.load_with_timm(folder, wanted=subject.model)
    traced = program.to_program(subject) if wanted & {"torch", "onnx"} else None
    if traced is not None and "torch" in wanted:
        path = folder / program.PROGRAM
        program.write_program(path, traced, card=about)
        loaded["torch"] = program.load_program(path, card=about)
    if traced is not None and "onnx" in wanted:
        path = folder / onnx_file.ONNX
        opset = onnx_file.write_onnx(path, traced, card=about)
        loaded["onnx"] = onnx_file.load_onnx(path)
    return {
        name: {
            "files": [file for file in _FILES[name] if (folder / file).exists()],
            "difference": checks.check(
                name, run, cases=cases, tolerance=options.tolerance
            ),
            **({"opset": opset} if name == "onnx" else {}),
        }
        for name, run in loaded.items()
    }


def _print_summary(written: Mapping[str, Mapping[str, Any]], *, out: Path) -> None:
    for name, of_format in written.items():
        megabytes = (
            sum((out / file).stat().st_size for file in of_format["files"]) / 1e6
        )
        differences = ", ".join(
            f"{value:.1e} on {kind}" if value else f"0 on {kind}"
            for kind, value in of_format["difference"].items()
        )
        files = ", ".join(of_format["files"])
        opset = f" (opset {of_format['opset']})" if "opset" in of_format else ""
        print(f"{name:6}{files}{opset}, {megabytes:,.1f} MB")
        print(f"{'':6}largest difference of logits {differences}")
        if "needs" in of_format:
            print(f"{'':6}`import {of_format['needs']}` before timm loads it")
        if checks.IMAGES not in of_format["difference"]:
            print(f"{'':6}not tried on real images: give some by --images")
    print(f"written {out}")


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    written = export_checkpoint(options)
    _print_summary(written, out=Path(options.out))


def main() -> None:
    """Run the command line."""
    run_command(_main, prog=_PROG)


if __name__ == "__main__":
    main()
