"""Small drawn pictures: each class is a shape and a colour, each image of it moved, scaled and lit anew."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES = ("ellipse", "rectangle", "triangle", "cross")
COLOURS = ((200, 40, 40), (40, 160, 60), (50, 70, 200), (220, 180, 30), (140, 60, 160), (30, 160, 170))


def draw(shape: str, colour: tuple[int, int, int], seed: int, size: int = 48) -> Image.Image:
    rng = random.Random(f"{shape} {colour} {seed}")
    light = rng.randint(150, 255)
    image = Image.new("RGB", (size, size), (light, light, light))
    pen = ImageDraw.Draw(image)
    r = rng.uniform(0.22, 0.34) * size
    x, y = (rng.uniform(0.4, 0.6) * size for _ in range(2))
    match shape:
        case "ellipse":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        case "rectangle":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
        case "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
        case _:
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)
    return image


def write_folder(root: Path, *, classes: int = 12, each: int = 6, suffix: str = ".png") -> Path:
    """`root/<class>/<n>.png`."""
    for c in range(classes):
        shape, colour = SHAPES[c % len(SHAPES)], COLOURS[c // len(SHAPES) % len(COLOURS)]
        folder = root / f"{shape}-{c:02d}"
        folder.mkdir(parents=True)
        for i in range(each):
            draw(shape, colour, i).save(folder / f"{i}{suffix}")
    return root


def write_csv(root: Path, path: Path, *, split: bool = False) -> Path:
    """A table beside a folder of class folders."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", *(["split"] if split else [])])
        for folder in sorted(p for p in root.iterdir() if p.is_dir()):
            for i, image in enumerate(sorted(folder.iterdir())):
                word = ("train", "train", "train", "val", "test", "test")[i % 6]
                rows.writerow([image.relative_to(path.parent), folder.name, *([word] if split else [])])
    return path
