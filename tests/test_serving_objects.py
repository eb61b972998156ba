"""Boxes, names, and what is unknown: against transformers picture by picture, against `embed`, and with bad input."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vicinal
from tiny_encoders import transformers as tiny_clip
from vicinal.data.images import Cutout
from vicinal.data.manifest import Manifest
from vicinal.embedding import embed, embed_cutouts
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.serving.detectors import Boxes, Tiles, load_detector
from vicinal.serving.index import Index
from vicinal.serving.matching import Matcher
from vicinal.serving.objects import Answer, DetectLogosDETR, ObjectMatcher, draw, open_encoder
from vicinal.types import Embeddings, InputError

BOX = (0.25, 0.5, 0.3, 0.4)  # centre and size of what the detectors here are made to find
LETTERS = "AKMS"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("vicinal:nano")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of each of four letters, in folders."""
    root = tmp_path_factory.mktemp("references")
    for letter in LETTERS:
        (root / letter).mkdir()
        for i in range(2):
            letter_picture(letter, 60 + 4 * i).save(root / letter / f"{i}.png")
    return root


def letter_picture(letter: str, side: int) -> Image.Image:
    from PIL import ImageDraw, ImageFont

    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text(
        (side / 2, side / 2), letter, fill="black", font=ImageFont.load_default(size=side * 0.8), anchor="mm"
    )
    return image


def scene(letters: str, width: int = 240, height: int = 120) -> tuple[Image.Image, list[tuple[float, ...]]]:
    """Letters on white cards side by side on a dark ground, and their boxes."""
    image, boxes = Image.new("RGB", (width, height), (40, 60, 80)), []
    for i, letter in enumerate(letters):
        x, y = 12 + 76 * i, 30
        image.paste(letter_picture(letter, 60), (x, y))
        boxes.append((float(x), float(y), float(x + 60), float(y + 60)))
    return image, boxes


def yolos(folder: Path, **changes: object) -> Path:
    """A tiny YOLOS with random weights, but for its last layers: every query finds BOX."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 64],
        num_detection_tokens=4,
        use_mid_position_embeddings=False,
        id2label={0: "mark", 1: "face"},
        label2id={"mark": 0, "face": 1},
    )
    model = YolosForObjectDetection(config)
    forced(model.bbox_predictor, model.class_labels_classifier)
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    YolosImageProcessor(size=size, do_pad=False, **changes).save_pretrained(folder)
    return folder


def detr(folder: Path) -> Path:
    """A tiny DETR whose pictures keep their shape, so that a batch would need padding."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        id2label={0: "mark", 1: "face"},
        label2id={"mark": 0, "face": 1},
    )
    model = DetrForObjectDetection(config)
    with torch.no_grad():  # boxes that depend on the picture, and scores above one half
        model.bbox_predictor.layers[-1].weight.mul_(20)
        model.class_labels_classifier.bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    model.save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


@torch.no_grad()
def forced(boxes: torch.nn.Module, classes: torch.nn.Module) -> None:
    for head, bias in ((boxes, torch.logit(torch.tensor(BOX))), (classes, torch.tensor([4.0, 0.0, 0.0]))):
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.copy_(bias)


def fixed(*boxes: tuple[float, float, float, float], scores: Sequence[float] = ()) -> object:
    """A detector that finds these boxes in every picture."""

    def find(pictures: Sequence[Tensor]) -> list[Boxes]:
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return [Boxes(corners, torch.tensor(scores or [0.9] * len(boxes))) for _ in pictures]

    return find


# ---- detectors


def test_a_detector_saved_and_loaded_finds_its_box_in_pixels(tmp_path: Path, encoder: Encoder) -> None:
    matcher = ObjectMatcher(yolos(tmp_path / "yolos"), embedding_model=encoder)
    pictures = [Image.new("RGB", (200, 100)), Image.new("RGB", (80, 160))]
    for picture, answer in zip(pictures, matcher.detect(pictures), strict=True):
        assert len(answer) == 1  # four queries find the same box
        width, height = picture.size
        x, y, w, h = BOX
        expected = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        assert answer[0].box == pytest.approx(expected, abs=0.01)
        assert answer[0].kind == "mark"
        assert answer[0].box_score == pytest.approx(torch.tensor([4.0, 0, 0]).softmax(0)[0].item(), abs=1e-4)
        assert answer[0].label is None
        assert answer.size == (height, width)


def test_a_batch_gives_what_transformers_gives_picture_by_picture(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    folder = detr(tmp_path / "detr")
    model, processor = AutoModelForObjectDetection.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    generator = np.random.default_rng(0)
    shapes = [(90, 140), (120, 60), (90, 140), (64, 64)]
    pictures = [torch.from_numpy(generator.integers(0, 255, (3, *shape), dtype=np.uint8)) for shape in shapes]
    found = load_detector(folder, threshold=0.3)(pictures)
    assert sum(len(one.scores) for one in found) > 4
    for picture, one in zip(pictures, found, strict=True):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        with torch.inference_mode():
            outputs = model.eval()(**processor(images=image, return_tensors="pt"))
        sizes = [tuple(picture.shape[1:])]
        expected = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=sizes)[0]
        torch.testing.assert_close(one.corners, expected["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(one.scores, expected["scores"], atol=1e-4, rtol=0)
    assert not torch.allclose(found[0].corners[0], found[2].corners[0])  # they depend on the picture


def test_what_is_no_detector_is_named(tmp_path: Path, encoder: Encoder) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, YolosModel

    def refused(uri: Path | str, *words: str) -> None:
        with pytest.raises(InputError) as error:
            ObjectMatcher(uri, embedding_model=encoder)
        assert all(word in str(error.value) for word in words), str(error.value)

    refused(tmp_path / "nowhere", "no detector folder", "nowhere")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    refused(tmp_path / "photos", "no config.json", "a.jpg")
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPVisionConfig(**settings, image_size=32, patch_size=16)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    refused(tmp_path / "clip", "'clip_vision_model'", "CLIPVisionModelWithProjection", "finds no boxes", "detr")
    folder = yolos(tmp_path / "yolos")
    YolosModel.from_pretrained(folder).save_pretrained(tmp_path / "body")
    (tmp_path / "body" / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    refused(tmp_path / "body", "without the weights of a detector", "random")
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "not whole")
    (folder / "config.json").write_text("{")
    refused(folder, "no detector that can be read")


def test_boxes_are_cut_at_the_edges_thinned_and_sorted(encoder: Encoder) -> None:
    find = fixed(
        (-5, -5, 50, 50),
        (0, 0, 52, 50),  # the same thing
        (60, 10, 70, 90),  # too narrow
        (80, 20, 130, 90),  # sticks out
        (math.nan, 0, 5, 5),
        (200, 0, 260, 60),  # outside
        scores=(0.7, 0.9, 0.9, 0.8, 0.9, 0.9),
    )
    answer = ObjectMatcher(find, embedding_model=encoder).detect([Image.new("RGB", (120, 100))])[0]
    assert answer.boxes == [(0, 0, 52, 50), (80, 20, 120, 90)]
    assert [one.box_score for one in answer] == pytest.approx([0.9, 0.8])


def test_tiles_cover_the_picture() -> None:
    height, width = 90, 200
    corners = Tiles([1, 3])([torch.zeros(3, height, width, dtype=torch.uint8)])[0].corners
    covered = torch.zeros(height, width)
    for x0, y0, x1, y1 in corners.round().int().tolist():
        assert x0 >= 0
        assert y0 >= 0
        assert x1 <= width
        assert y1 <= height
        covered[y0:y1, x0:x1] += 1
    assert covered.min() >= 2  # of two levels
    sides = (corners[:, 2:] - corners[:, :2]).round().unique()
    assert sides.tolist() == [30, 90]
    with pytest.raises(InputError, match="whole numbers"):
        Tiles([])


# ---- names


def test_objects_are_named_or_unknown_with_the_references_that_decided(encoder: Encoder, references: Path) -> None:
    image, boxes = scene("AK")
    other, more = scene("Q")
    matcher = ObjectMatcher(fixed(*boxes), embedding_model=encoder, references=references, threshold=0.9, pad=0.0)
    answer = matcher.detect([image])[0]
    assert answer.labels == ["A", "K"]
    assert answer.scores == pytest.approx([one.score for one in answer.objects])
    for one in answer:
        assert {name.split("/")[0] for name, _ in one.references} == {one.label}
        assert [cosine for _, cosine in one.references] == sorted((c for _, c in one.references), reverse=True)
        assert one.second in set(LETTERS) - {one.label}
    stranger = matcher.detect([other], boxes=[more])[0]
    assert stranger.labels == [None]
    assert stranger.unknown[0].best in LETTERS


def test_given_boxes_are_embedded_as_a_manifest_of_boxes_is(tmp_path: Path, encoder: Encoder, references: Path) -> None:
    rows = []
    for i, letters in enumerate(("AK", "MSA")):
        image, boxes = scene(letters)
        image.save(tmp_path / f"{i}.png")
        rows += [(f"{i}.png", box, letter) for box, letter in zip(boxes, letters, strict=True)]
    table = {"image": [r[0] for r in rows], "box": [list(r[1]) for r in rows], "label": [r[2] for r in rows]}
    manifest = Manifest.build(table, tmp_path, classes=LETTERS)
    matcher = ObjectMatcher(embedding_model=encoder, references=references)
    assert matcher.matcher is not None
    expected = matcher.matcher.match(embed(encoder, manifest).vectors, fingerprint=encoder.fingerprint())
    given = [[r[1] for r in rows if r[0] == f"{i}.png"] for i in range(2)]
    answers = matcher.detect([tmp_path / "0.png", tmp_path / "1.png"], boxes=given)
    assert [label for answer in answers for label in answer.labels] == expected.names() == list("AKMSA")
    scores = torch.tensor([score for answer in answers for score in answer.scores])
    torch.testing.assert_close(scores, expected.scores, atol=5e-3, rtol=0)
    wider = ObjectMatcher(embedding_model=encoder, references=references, pad=0.1)
    expected = matcher.matcher.match(
        embed(encoder, manifest.with_padding(0.1)).vectors, fingerprint=encoder.fingerprint()
    )
    answers = wider.detect([tmp_path / "0.png", tmp_path / "1.png"], boxes=given)
    padded = torch.tensor([score for answer in answers for score in answer.scores])
    torch.testing.assert_close(padded, expected.scores, atol=5e-3, rtol=0)
    assert (padded - scores).abs().max() > 0.02


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_change_nothing(encoder: Encoder, references: Path, batch_size: int) -> None:
    pictures = [scene(letters)[0] for letters in ("AK", "", "MSA", "K")]
    boxes = [scene(letters)[1] for letters in ("AK", "", "MSA", "K")]
    matcher = ObjectMatcher(embedding_model=encoder, references=references, batch_size=batch_size)
    answers = matcher.detect(pictures, boxes=boxes)
    assert [answer.labels for answer in answers] == [["A", "K"], [], ["M", "S", "A"], ["K"]]
    assert [answer.name for answer in answers] == ["#0", "#1", "#2", "#3"]


def test_tiles_find_what_the_references_show(encoder: Encoder, references: Path) -> None:
    image = Image.new("RGB", (240, 120), (40, 60, 80))
    image.paste(letter_picture("S", 60), (120, 60))  # on the grid of level 2
    matcher = ObjectMatcher(embedding_model=encoder, references=references, threshold=0.97, levels=[2])
    answer = matcher.detect([image])[0]
    assert answer.labels == ["S"]
    assert answer.boxes == [(120, 60, 180, 120)]
    assert len(matcher.detect([Image.new("RGB", (240, 120))])[0]) == 0  # unknown tiles say nothing


def test_pictures_without_boxes_or_pixels_do_not_stop_the_others(
    tmp_path: Path, encoder: Encoder, references: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, boxes = scene("A")
    image.save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    paths = [tmp_path / "torn.png", tmp_path / "good.png", tmp_path / "none.png"]
    matcher = ObjectMatcher(
        fixed(*boxes), embedding_model=encoder, references=references, logger=logging.getLogger("mine")
    )
    answers = matcher.detect(paths)
    assert [len(answer) for answer in answers] == [0, 1, 0]
    assert "torn.png" in (answers[0].error or "")
    assert answers[0].size is None
    assert [Path(name).name for name, _ in matcher.skipped] == ["torn.png", "none.png"]
    assert {record.name for record in caplog.records} == {"mine"}
    with pytest.raises(InputError, match=r"torn\.png"):
        matcher.detect(paths, on_error="raise")
    nothing = ObjectMatcher(fixed(), embedding_model=encoder, references=references).detect([image])[0]
    assert nothing.labels == []
    assert nothing.error is None
    assert nothing.size == (120, 240)
    assert matcher.detect([]) == []


def test_a_box_outside_its_picture_names_it(encoder: Encoder, references: Path) -> None:
    image, boxes = scene("A")
    matcher = ObjectMatcher(embedding_model=encoder, references=references)
    answers = matcher.detect([image, image], boxes=[[(0, 0, 900, 10)], boxes])
    assert "#0" in (answers[0].error or "")
    assert "outside" in (answers[0].error or "")
    assert answers[1].labels == ["A"]
    with pytest.raises(InputError, match="1 lists for 2 pictures"):
        matcher.detect([image, image], boxes=[boxes])
    with pytest.raises(InputError, match="a box is x0, y0, x1, y1"):
        matcher.detect([image], boxes=[[(0, 0, 5)]])
    wrong = matcher.detect([torch.zeros(3, 4, 4)])[0]
    assert "bytes" in (wrong.error or "")


# ---- models, references, thresholds


def test_every_layout_of_an_embedding_model_is_opened(tmp_path: Path) -> None:
    encoder = tiny_clip(tmp_path / "transformers")
    encoder.model.save_pretrained(tmp_path / "transformers")  # the folder held no weights
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert open_encoder(encoder) is encoder
    encoder.save(tmp_path / "run" / "model")
    inner = tmp_path / "sentences"
    (inner / "0_Transformer").mkdir(parents=True)
    for file in (tmp_path / "transformers").iterdir():
        (inner / "0_Transformer" / file.name).write_bytes(file.read_bytes())
    (inner / "modules.json").write_text(json.dumps([{"idx": 0, "path": "0_Transformer"}]))
    for folder in ("run", "run/model", "transformers", "sentences"):
        torch.testing.assert_close(open_encoder(tmp_path / folder).encode_image(image), encoder.encode_image(image))
    with pytest.raises(InputError, match=r"folder without vicinal\.json"):
        open_encoder(tmp_path)
    with pytest.raises(InputError, match="no/such-model"):  # taken for an id of the Hub
        open_encoder("no/such-model")
    (inner / "modules.json").write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        open_encoder(inner)


def test_references_come_as_index_embeddings_or_matcher_of_the_same_model(encoder: Encoder, references: Path) -> None:
    image, boxes = scene("MK")
    made = ObjectMatcher(embedding_model=encoder, references=references, fusion="max").matcher
    assert made is not None
    vectors = embed(encoder, vicinal.read_folder(references))
    index = Index(encoder.fingerprint())
    index.add(vectors, fingerprint=encoder.fingerprint())
    for given in (index, vectors, made):
        settings = {} if isinstance(given, Matcher) else {"fusion": "max"}
        matcher = ObjectMatcher(embedding_model=encoder, references=given, **settings)
        assert matcher.matcher is not None
        assert matcher.matcher.settings == made.settings
        assert matcher.detect([image], boxes=[boxes])[0].labels == ["M", "K"]
    other = Index("0" * 64)
    other.add(vectors, fingerprint="0" * 64)
    with pytest.raises(InputError, match="references are of the model 000000000000"):
        ObjectMatcher(embedding_model=encoder, references=other)
    with pytest.raises(InputError, match="the matcher has fusion='max'"):
        ObjectMatcher(embedding_model=encoder, references=made, fusion="mean")
    threshold = made.threshold
    stricter = ObjectMatcher(embedding_model=encoder, references=made, threshold=np.float32(0.5)).matcher
    assert stricter is not None
    assert stricter.threshold == 0.5
    assert made.threshold == threshold  # the one that was given stays as it is
    with pytest.raises(InputError, match="no labels"):
        ObjectMatcher(embedding_model=encoder, references=vicinal.read_folder(references, labels=False))


def rule_for(encoder: Encoder, **settings: object) -> OpenSetThreshold:
    vectors = Embeddings(torch.eye(2, encoder.embedding_dim), torch.tensor([0, 1]), ("a", "b"), ("a", "b"))
    matcher = Matcher(vectors, fingerprint=encoder.fingerprint(), **settings)
    return OpenSetThreshold().fit(
        [0.9, 0.8, 0.3], [True, True, False], fingerprint=encoder.fingerprint(), settings=matcher.settings
    )


def test_a_fitted_threshold_brings_its_settings_and_is_refused_for_others(
    tmp_path: Path, encoder: Encoder, references: Path
) -> None:
    rule = rule_for(encoder, fusion="mean", margin=0.05)
    rule.save(tmp_path / "threshold.json")
    for given in (rule, tmp_path / "threshold.json", str(tmp_path / "threshold.json")):
        matcher = ObjectMatcher(embedding_model=encoder, references=references, threshold=given).matcher
        assert matcher is not None
        assert matcher.threshold == pytest.approx(rule.threshold_)
        assert matcher.fusion == "mean"
        assert matcher.margin == 0.05
    with pytest.raises(InputError, match="fitted with fusion='mean', and here it is 'max'"):
        ObjectMatcher(embedding_model=encoder, references=references, threshold=rule, fusion="max")
    other = OpenSetThreshold().fit([0.9, 0.3], [True, False], fingerprint="f" * 64, settings=rule.settings_)
    with pytest.raises(InputError, match="the model ffffffffffff"):
        ObjectMatcher(embedding_model=encoder, references=references, threshold=other)
    encoder.save(tmp_path / "model")
    (tmp_path / "threshold.json").rename(tmp_path / "model" / "threshold.json")
    beside = ObjectMatcher(embedding_model=tmp_path / "model", references=references).matcher
    assert beside is not None
    assert beside.threshold == pytest.approx(rule.threshold_)
    assert beside.fusion == "mean"


def test_the_old_name_takes_the_old_arguments(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    assert DetectLogosDETR is ObjectMatcher is vicinal.ObjectMatcher
    image, boxes = scene("A")
    found = DetectLogosDETR(logger=logging.getLogger("theirs"), embedding_model=encoder).detect([image], boxes=[boxes])
    assert found[0].boxes == boxes
    assert found[0].labels == [None]
    assert math.isnan(found[0].scores[0])
    with pytest.raises(ValueError, match="overlap"):
        ObjectMatcher(embedding_model=encoder, overlap=0.0)


# ---- what is shown


def test_answers_are_plain_json(encoder: Encoder, references: Path) -> None:
    image, boxes = scene("AK")
    answer = ObjectMatcher(embedding_model=encoder, references=references).detect([image], boxes=[boxes])[0]
    plain = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert [one["label"] for one in plain["objects"]] == ["A", "K"]
    assert plain["objects"][0]["references"][0]["id"].startswith("A/")
    alone = ObjectMatcher(embedding_model=encoder).detect([image], boxes=[boxes])[0].to_dict()
    assert json.loads(json.dumps(alone, allow_nan=False))["objects"][0]["score"] is None


def test_the_best_classes_and_the_share_of_strangers_are_told(encoder: Encoder, references: Path) -> None:
    image, boxes = scene("AQ")
    rule = rule_for(encoder, fusion="max", margin=0.0)
    matcher = ObjectMatcher(embedding_model=encoder, references=references, threshold=rule)
    answer = matcher.detect([image], boxes=[boxes])[0]
    assert matcher.matcher is not None
    classes = matcher.matcher.present
    for one in answer:
        assert len(one.candidates) == min(5, len(classes))
        assert [score for _, score in one.candidates] == sorted((v for _, v in one.candidates), reverse=True)
        assert one.candidates[0] == (one.best, one.score)
        assert one.candidates[1][0] == one.second
        assert one.stranger_share == pytest.approx(rule.stranger_share([one.score])[0])
    plain = answer.to_dict()["objects"][0]
    assert plain["candidates"][0] == {"class": "A", "score": pytest.approx(answer[0].score, abs=1e-6)}
    assert plain["stranger_share"] == pytest.approx(0.5)  # one stranger of .3 was fitted on
    unsure = rule_for(encoder, fusion="max", margin=5.0)
    tied = ObjectMatcher(embedding_model=encoder, references=references, threshold=unsure).detect(
        [image], boxes=[boxes]
    )
    assert [one.stranger_share for one in tied[0]] == [1.0, 1.0]  # refused by the margin, as some strangers were
    by_number = ObjectMatcher(embedding_model=encoder, references=references, threshold=0.5)
    assert math.isnan(by_number.detect([image], boxes=[boxes])[0][0].stranger_share)


def test_a_drawing_shows_boxes_and_names(encoder: Encoder, references: Path) -> None:
    image, boxes = scene("AQ")
    answer = ObjectMatcher(embedding_model=encoder, references=references, threshold=0.9).detect(
        [image], boxes=[boxes]
    )[0]
    assert answer.labels == ["A", None]
    drawn = draw(image, answer)
    assert max(drawn.size) == 640
    scale = 640 / 240
    pixels = np.array(drawn).astype(int)
    middle_of_left_edge = [(round(y * scale), round(box[0] * scale)) for box in boxes for y in [(box[1] + box[3]) / 2]]
    green, brown = (pixels[place] for place in middle_of_left_edge)
    assert green.tolist() == [0, 122, 61]
    assert brown.tolist() == [166, 84, 0]
    changed = (pixels != np.array(draw(image, Answer("", None)))).any(2)
    label = changed[: round(boxes[0][1] * scale) - 2]
    assert label.any()  # its name stands above the box
    with pytest.raises(InputError):
        draw("nothing.png", answer)


def test_cutouts_in_memory_are_embedded_as_files_are(tmp_path: Path, encoder: Encoder, references: Path) -> None:
    manifest = vicinal.read_folder(references)
    expected = embed(encoder, manifest, precision="fp32").vectors
    cutouts = [Cutout.whole(manifest.image(i)) for i in range(len(manifest))]
    encoder.train()
    found = embed_cutouts(encoder, iter(cutouts), batch_size=3, precision="fp32")
    assert encoder.training
    encoder.eval()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert embed_cutouts(encoder, []).shape == (0, encoder.embedding_dim)
