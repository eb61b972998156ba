"""Prompt templates of the published few-shot data sets, as the released code has them, not always as the papers do.

A class's text is each template with the class's name in place of `{}`, its underscores made spaces. Its vector is the
mean of the prompts' unit vectors, made unit again.

ImageNet takes seven prompts together, every other set has one. Some releases use "a photo of a {}." for all sets, or
add sentences of a language model: their numbers do not compare with those of these templates.
"""

from __future__ import annotations

from collections.abc import Sequence

from vicinal.types import InputError

__all__ = ["GENERIC", "TEMPLATES", "prompts"]

GENERIC: tuple[str, ...] = ("a photo of a {}.",)
"""For data of one's own."""

_IMAGENET = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "imagenet": _IMAGENET,
    "caltech101": GENERIC,
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "stanford_cars": GENERIC,
    "flowers102": ("a photo of a {}, a type of flower.",),
    "food101": ("a photo of {}, a type of food.",),  # no article
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.",),
    "sun397": GENERIC,
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "ucf101": ("a photo of a person doing {}.",),
    "imagenet_v2": _IMAGENET,
    "imagenet_sketch": _IMAGENET,
    "imagenet_a": _IMAGENET,
    "imagenet_r": _IMAGENET,
    "cub": ("a photo of a {}, a type of bird.",),
    "stanford_dogs": GENERIC,
    "plantdoc": GENERIC,
}
"""Data set -> its templates: the eleven of CoOp first, then the shifted ImageNets and three more."""


def prompts(classes: Sequence[str], templates: Sequence[str] = GENERIC) -> list[list[str]]:
    """Each class in each template.

    Args:
        classes: C names.
        templates: P sentences with `{}` where the name belongs.

    Returns:
        C lists of P prompts.

    Raises:
        InputError: no template, or one without `{}`.

    >>> prompts(["red_rose"], TEMPLATES["flowers102"])
    [['a photo of a red rose, a type of flower.']]
    """
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"template {template!r} must hold {{}} once, where the class's name belongs")
    if not templates:
        raise InputError('no template; give at least one, such as "a photo of a {}."')
    return [[template.replace("{}", name.replace("_", " ")) for template in templates] for name in classes]
