"""The whole way offline: characters in the typefaces that matplotlib ships, and a small model that begins from nothing.

    make demo        (or: python examples/demo.py)

A class is a character, an image of it is one typeface. A quarter of the characters is never seen in training. The model
starts with random weights, so this shows the way, not what a pretrained model gains; see README.md for that.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from vicinal import Recipe
from vicinal.run import run

OUT = Path("demo")
SIZE = 48
FACES = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
]
LATIN, GREEK = ((0x41, 0x5A), (0x61, 0x7A)), ((0x391, 0x3A9), (0x3B1, 0x3C9))
CYRILLIC, ARMENIAN, GEORGIAN = (0x410, 0x44F), (0x531, 0x556), (0x10D0, 0x10F0)
ALPHABETS = (*LATIN, *GREEK, CYRILLIC, ARMENIAN, GEORGIAN)


def draw(character: str, face: Path) -> Image.Image:
    """The character in the middle of white paper."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    font = ImageFont.truetype(str(face), 32)
    ImageDraw.Draw(image).text((SIZE / 2, SIZE / 2), character, font=font, fill="black", anchor="mm")
    return image


def main() -> None:
    """Draw the pictures, once, then run a recipe on them."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    photos = OUT / "characters"
    drawn: set[bytes] = set()
    for code in (code for first, last in ALPHABETS for code in range(first, last + 1)):
        name = unicodedata.name(chr(code), "").lower().replace(" ", "-")
        pictures = {face: draw(chr(code), fonts / f"{face}.ttf") for face in FACES}
        same = {picture.tobytes() for picture in pictures.values()}
        if not name or same & drawn:  # Latin A, Greek Alpha and Cyrillic A are one drawing: the first stands for all
            continue
        drawn |= same
        (photos / name).mkdir(parents=True, exist_ok=True)
        for face, picture in pictures.items():
            picture.save(photos / name / f"{face}.png")
    recipe = Recipe.parse(
        {
            "data": {"folder": str(photos)},
            "split": {"class_disjoint": {"holdout": 0.25, "val": 0.0}},
            "model": "timm:resnet10t",
            "random_init": True,
            "preprocess": {"size": SIZE},
            "adapt": [{"full": {}}],
            "loss": {"arcface": {"margin": 0.2, "scale": 16}},
            "class_means": False,  # the means of random features say nothing
            "lr": 2e-3,
            "steps": 200,
        }
    )
    page = run(recipe, OUT / "run", resume="last") / "report.html"
    print(f"\nOpen {page.resolve()}\n\nWith your own images:")
    print("  vicinal check FOLDER\n  vicinal init FOLDER --out mine.yaml\n  vicinal train mine.yaml out=runs/mine")


if __name__ == "__main__":
    main()
