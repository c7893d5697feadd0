"""Cut JPEGs like ImageNet's out of the photographs in three wheels.

About 500x375 pixels and 105 kB each, from ten scenes. They are made when needed and
never committed: the photographs belong to scikit-image, scikit-learn and Matplotlib.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

# Real colour photographs only, one a scene.
PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
# At 98 the crops hold 4.5 bits a pixel, as ImageNet's files do.
QUALITY = 98


def cut_photographs(folder: Path, *, num_images: int, seed: int) -> list[Path]:
    """Cut `num_images` JPEGs into `folder`, named SCENE-00000.jpg, scenes in turn.

    Each is a random window of a photograph, scaled to 500x375 give or take 15 % a
    side, half of them mirrored, three quarters lying and a quarter standing.

    Args:
        folder: Made where it is missing.
        num_images: How many to cut.
        seed: The same seed gives the same files with the same Pillow and NumPy.

    Returns:
        The files' paths, in the order of their numbers.

    Raises:
        FileNotFoundError: A package with photographs is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sources = [_path(package, path) for package, path in PHOTOGRAPHS]
    photographs = [Image.open(path).convert("RGB") for path in sources]
    paths = []
    for number in range(num_images):
        scene = number % len(sources)
        path = folder / f"{sources[scene].stem}-{number:05d}.jpg"
        _cut(photographs[scene], rng=rng).save(path, quality=QUALITY)
        paths.append(path)
    return paths


def _path(package: str, path: str) -> Path:
    """Find a photograph without importing its package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"expected the photographs of {package}, got no such package; install the "
            "requirements for development"
        )
    return Path(spec.origin).parent / path


def _cut(photograph: Image.Image, *, rng: np.random.Generator) -> Image.Image:
    width, height = (int(side * rng.uniform(0.85, 1.15)) for side in (500, 375))
    if rng.random() < 0.25:
        width, height = height, width
    fit = min(photograph.width / width, photograph.height / height)
    scale = fit * rng.uniform(0.7, 1.0)
    left = rng.uniform(0, photograph.width - width * scale)
    top = rng.uniform(0, photograph.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    image = photograph.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
