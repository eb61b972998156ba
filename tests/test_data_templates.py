"""Prompt templates: the published sets have theirs, and names go in where they belong."""

from __future__ import annotations

import pytest

from vicinal.data.templates import GENERIC, TEMPLATES, prompts
from vicinal.types import InputError


def test_the_eleven_data_sets_have_templates():
    assert list(TEMPLATES)[:11] == [
        "imagenet",
        "caltech101",
        "oxford_pets",
        "stanford_cars",
        "flowers102",
        "food101",
        "fgvc_aircraft",
        "sun397",
        "dtd",
        "eurosat",
        "ucf101",
    ]
    assert {name: len(templates) for name, templates in TEMPLATES.items() if len(templates) != 1} == dict.fromkeys(
        ["imagenet", "imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r"], 7
    )


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_each_takes_a_name(name: str):
    (filled,) = prompts(["moon_rock"], TEMPLATES[name])
    assert all(prompt.count("moon rock") == 1 and "{" not in prompt for prompt in filled)


def test_names_with_braces_are_names():
    assert prompts(["{odd}"], GENERIC) == [["a photo of a {odd}."]]


@pytest.mark.parametrize("templates", [(), ("a photo.",), ("{} and {}",)])
def test_templates_without_a_place(templates: tuple[str, ...]):
    with pytest.raises(InputError, match="template"):
        prompts(["a"], templates)
