"""The whole idea on real data in a few minutes, with nothing to download: built-in characters, a built-in small model.

`vicinal:nano` has learnt other characters in other typefaces, three times as large. Here it meets small print:
characters that it has never seen, in 16 pixels. It is adapted on half of them in one family of typefaces, and measured
on the other half in another family: characters and typefaces that neither the model nor its adaptation has seen.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path

from vicinal.bring import bring
from vicinal.data.check import check
from vicinal.ground import Say
from vicinal.progress import Bar
from vicinal.recipe import Recipe
from vicinal.run import run

__all__ = ["RECIPE", "demo"]

RECIPE = {
    "data": {
        "glyphs": {
            "size": 16,
            "portion": "adaptation",
            "families": ["dejavu_mono", "dejavu_serif"],
            "test_families": ["dejavu_serif"],
            "images_per_face": 2,
        }
    },
    "split": {"class_disjoint": {"holdout": 0.5, "seed": 42, "val": 0.0}},
    "model": "vicinal:nano",
    "adapt": [{"lora": {"rank": 8}}],
    "loss": {"arcface": {"margin": 0.3, "scale": 20.0}},
    "augment": "logo",
    "lr": 1e-3,
    "steps": 600,
}


def demo(out: str | Path = "demo", *, show: bool = True, say: Say = print) -> Path:
    """Bring the glyphs, check them, measure nano, adapt it, and prove what that did, on a page.

    Args:
        out: the run folder. A demo that was stopped goes on where it was.
        show: open the page in a browser, if there is one.
        say: is told each stage in one line.

    Returns:
        The page.

    Raises:
        InputError: `out` holds another run.
    """
    recipe = Recipe.parse(RECIPE, name="demo")
    say("small print of DejaVu, the typefaces that matplotlib ships: a class is a character, an image one face of it")
    glyphs = bring(recipe.data)
    with Bar("checking", len(glyphs)) as bar:
        findings = check(glyphs, near=False, progress=bar.to)
    say(str(findings))
    begun = (Path(out).expanduser() / "checkpoints").exists()
    page = (run(recipe, out, resume="last" if begun else None, say=say) / "report.html").resolve()
    say(f"\nThe page: {page}\n\nWith your own images:")
    say("  vicinal check ~/products                            what is in the folder, and what is wrong with it")
    say("  vicinal init ~/products --out products.yaml         a recipe for what was found")
    say("  vicinal train products.yaml out=runs/products       baseline, adaptation, difference, page")
    if show:
        webbrowser.open(page.as_uri())
    return page
