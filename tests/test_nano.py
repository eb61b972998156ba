"""The built-in model: small, read by other libraries, and good at what it has never seen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import vicinal.models.backbones as room
from vicinal import demo as demo_room
from vicinal.data.glyphs import load_glyphs
from vicinal.data.transforms import eval_transform
from vicinal.embedding import embed, embed_classes
from vicinal.evaluation.image_text import zero_shot
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.serving.export import export
from vicinal.types import InputError

FOLDER = Path(room.__file__).parent / "nano"
TEXTS = ["greek small letter alpha", "Capital Latin letter A with a ring above", "ŻÓŁĆ 漢 ?", ""]


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return load_encoder("vicinal:nano")


def pictures(nano: Encoder, tmp_path: Path) -> torch.Tensor:
    glyphs = load_glyphs(characters="αβΩж→", families=["dejavu_serif"], cache=tmp_path)
    transform = eval_transform(nano.preprocess)
    return torch.stack([transform(glyphs.image(row)) for row in range(len(glyphs))])


def test_it_is_small_and_says_what_it_is(nano: Encoder) -> None:
    assert sum(p.numel() for p in nano.parameters()) < 1.1e6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 3_000_000
    assert (nano.source, nano.licence, nano.preprocess.size) == ("vicinal:nano", "apache-2.0", (48, 48))
    assert nano.logit_scale is not None
    assert nano.logit_scale > 20
    with pytest.raises(InputError, match="vicinal:nano"):
        load_encoder("vicinal:huge")


def test_transformers_gives_the_same_vectors(nano: Encoder, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(FOLDER)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    images = pictures(nano, tmp_path)
    with torch.no_grad():
        theirs = model(pixel_values=images, **tokens)
        ours = [F.normalize(vectors, dim=-1) for vectors in (nano.encode_image(images), nano.encode_text(TEXTS))]
    torch.testing.assert_close(ours[0], theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], theirs.text_embeds, atol=1e-5, rtol=0)
    processor = AutoImageProcessor.from_pretrained(FOLDER)
    assert (processor.crop_size["height"], processor.image_mean[0]) == (48, nano.preprocess.mean[0])


@pytest.mark.slow
def test_open_clip_gives_the_same_vectors_from_the_same_folder(nano: Encoder, tmp_path: Path) -> None:
    import open_clip
    from transformers import AutoModel

    folder = export(nano, tmp_path / "both", format=["open_clip", "transformers"])
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    images = pictures(nano, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_image(images), nano.encode_image(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(tokens), nano.encode_text(TEXTS), atol=1e-5, rtol=0)
    assert AutoModel.from_pretrained(folder).config.model_type == "clip"


def test_characters_and_a_family_that_it_never_saw_are_told_by_name(nano: Encoder, tmp_path: Path) -> None:
    glyphs = load_glyphs(portion="adaptation", families=["dejavu_mono"], characters="greek", cache=tmp_path)
    found = zero_shot(embed(nano, glyphs, workers=0), embed_classes(nano, glyphs.classes))["accuracy@0shot"]
    assert found.n > 50
    assert found.low > 10 / found.n, f"{found} is not ten times chance"


def test_the_demo_says_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"steps": 2, "draws": 2, "workers": 0, "cache": None, "trackers": []}
    glyphs = demo_room.RECIPE["data"]["glyphs"] | {"characters": "armenian", "images_per_face": 1}
    monkeypatch.setattr(demo_room, "RECIPE", demo_room.RECIPE | small | {"data": {"glyphs": glyphs}})
    opened: list[str] = []
    monkeypatch.setattr(demo_room.webbrowser, "open", opened.append)
    said: list[str] = []
    page = demo_room.demo(tmp_path / "demo", say=said.append)
    assert page.exists()
    assert opened == [page.as_uri()]
    text = "\n".join(said)
    assert str(page) in text
    assert [len(re.findall(f"vicinal {verb} ", text)) for verb in ("check", "init", "train")] == [1, 1, 1]
    assert re.search(r"unseen classes, map@r: \.?\d", text) or "unseen classes, map@r" in text
    assert demo_room.demo(tmp_path / "demo", show=False, say=said.append) == page, "a finished demo is not begun again"
