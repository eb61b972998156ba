"""Folders and tables recognised: what is written, and the judgement against explicit loops and by hand."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from click.testing import Result
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from typer.testing import CliRunner

from test_serving_objects import yolos
from vicinal.bring import starting_model
from vicinal.cli import app
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_folder, read_table, write_coco, write_table, write_voc
from vicinal.embedding import embed
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.recognise import (
    Judged,
    Scenes,
    compare,
    judge,
    measure,
    open_models,
    read_references,
    read_truth,
    recognise,
    sheet,
)
from vicinal.serving.detectors import Boxes
from vicinal.serving.index import Index
from vicinal.serving.matching import Matcher
from vicinal.serving.objects import ObjectMatcher
from vicinal.types import InputError

LETTERS = "AKMS"
SCENES = ("AK", "MQ", "S", "KAM", "Q")  # Q has no references


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("vicinal:nano")


def card(letter: str, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    font = ImageFont.load_default(size=side * 0.8)
    ImageDraw.Draw(image).text((side / 2, side / 2), letter, fill="black", font=font, anchor="mm")
    return image


def place(i: int) -> tuple[float, float, float, float]:
    return (12.0 + 76 * i, 30.0, 72.0 + 76 * i, 90.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`references` in class folders, `scenes` of letters, and one table of what is in them, in four formats."""
    root = tmp_path_factory.mktemp("data")
    for letter in LETTERS:
        (root / "references" / letter).mkdir(parents=True)
        for i in range(2):
            card(letter, 60 + 4 * i).save(root / "references" / letter / f"{i}.png")
    rows = []
    (root / "scenes" / "shop").mkdir(parents=True)
    for n, letters in enumerate(SCENES):
        image = Image.new("RGB", (260, 120), (40, 60, 80))
        for i, letter in enumerate(letters):
            image.paste(card(letter, 60), (int(place(i)[0]), 30))
            rows.append((f"scenes/shop/{n}.png", list(place(i)), letter))
        image.save(root / "scenes" / "shop" / f"{n}.png")
    columns = {"image": [r[0] for r in rows], "box": [r[1] for r in rows], "label": [r[2] for r in rows]}
    truth = Manifest.build(columns, root)
    write_table(truth, root / "truth.csv")
    write_coco(truth, root / "truth.json")
    write_voc(truth, root / "voc")
    return root


def fixed(*boxes: tuple[float, float, float, float]) -> Callable[[Sequence[Tensor]], list[Boxes]]:
    """A detector that finds these boxes in every picture, the first best."""

    def find(pictures: Sequence[Tensor]) -> list[Boxes]:
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return [Boxes(corners, 0.9 - 0.01 * torch.arange(len(corners)))] * len(pictures)

    return find


def matcher_for(encoder: Encoder, data: Path, detector: object = None, threshold: float = 0.9) -> ObjectMatcher:
    return ObjectMatcher(
        detector, embedding_model=encoder, references=data / "references", threshold=threshold, pad=0.0, margin=0.0
    )


# ---- reading


def test_truth_is_the_same_from_every_source(data: Path) -> None:
    found = [read_truth(data / name) for name in ("truth.csv", "truth.json", "voc")]
    for scenes in found:
        assert [len(labels) for labels in scenes.labels] == [len(letters) for letters in SCENES]
        assert scenes.labels == tuple(tuple(letters) for letters in SCENES)
        assert scenes.boxes == tuple(tuple(place(i) for i in range(len(letters))) for letters in SCENES)
        assert all(path.is_file() for path in scenes.paths)


def test_pictures_are_drawn_by_seed(data: Path) -> None:
    whole, some, again, other = (
        read_truth(data / "truth.csv", count=count, seed=seed) for count, seed in ((None, 1), (3, 1), (3, 1), (3, 2))
    )
    assert some == again != other
    assert len(some) == 3
    assert [name for name in whole.names if name in some.names] == list(some.names)  # in their order
    assert len(read_truth(data / "truth.csv", count=99)) == len(SCENES)
    with pytest.raises(InputError, match="0 pictures are none"):
        read_truth(data / "truth.csv", count=0)


def test_rows_without_a_box_are_whole_pictures(data: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    manifest = Manifest.build({"image": ["a.png"], "label": ["x"]}, tmp_path)
    assert Scenes.of(manifest, whole=True).boxes == (((0, 0, 40, 30),),)
    assert Scenes.of(manifest).boxes == ((),)
    write_table(manifest, tmp_path / "truth.csv")
    assert read_truth(tmp_path / "truth.csv").labels == (("x",),)


def test_references_need_classes(data: Path, tmp_path: Path) -> None:
    references = read_references(data / "references")
    assert isinstance(references, Manifest)
    assert references.classes == tuple(LETTERS)
    with pytest.raises(InputError, match="nothing"):
        read_references(tmp_path / "nothing.csv")
    with pytest.raises(InputError, match="not a matcher"):
        read_references(data / "truth.matcher")


# ---- what is written


def test_answers_are_written_and_drawn(encoder: Encoder, data: Path, tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    for n in range(len(SCENES)):
        (tmp_path / "scenes" / f"{n}.png").write_bytes((data / "scenes" / "shop" / f"{n}.png").read_bytes())
    (tmp_path / "scenes" / "1.jpg").write_bytes(b"torn")
    with Image.open(tmp_path / "scenes" / "0.png") as image:
        image.save(tmp_path / "scenes" / "0.jpg")  # meets 0.png in pictures/
    scenes = Scenes.of(read_folder(tmp_path / "scenes", labels=False))
    out = tmp_path / "out"
    matcher = matcher_for(encoder, data, fixed(place(0), place(1), place(2)))
    counts = recognise(matcher, scenes, out)
    written = json.loads((out / "matches.json").read_text())
    assert written["counts"] == counts
    assert written["about"]["matcher"]["fusion"] == "topk"
    assert written["about"]["threshold"] == 0.9
    by_name = {one["image"]: one for one in written["pictures"]}
    assert list(by_name) == sorted(by_name) == list(scenes.names)
    assert [o["label"] for o in by_name["0.png"]["objects"]][:2] == ["A", "K"]
    assert [o["label"] for o in by_name["3.png"]["objects"]] == ["K", "A", "M"]
    assert "torn" not in str(by_name["1.jpg"]["error"])
    assert "1.jpg" in by_name["1.jpg"]["error"]
    with (out / "matches.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == counts["objects"] == 18
    assert counts["left_out"] == 1
    assert sum(row["label"] != "" for row in rows) == counts["known"]
    assert next(row for row in rows if row["image"] == "3.png")["reference"].startswith("K/")
    drawn = sorted(path.name for path in (out / "pictures").iterdir())
    assert drawn == ["0-2.jpg", "0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    with Image.open(out / "sheet.jpg") as page:
        assert page.width > 900
    (out / "pictures" / "old.jpg").touch()
    recognise(matcher, Scenes(*(column[:1] for column in _columns(scenes))), out)
    assert [path.name for path in (out / "pictures").iterdir()] == ["0.jpg"]
    assert len(json.loads((out / "matches.json").read_text())["pictures"]) == 1
    assert not list(out.glob(".*"))


def _columns(scenes: Scenes) -> tuple[tuple[object, ...], ...]:
    return scenes.paths, scenes.names, scenes.boxes, scenes.labels


def test_boxes_of_a_table_stand_in_for_a_detector(encoder: Encoder, data: Path, tmp_path: Path) -> None:
    recognise(matcher_for(encoder, data), read_truth(data / "truth.csv"), tmp_path, pictures=False)
    written = json.loads((tmp_path / "matches.json").read_text())
    assert written["about"]["detector"] == "boxes given"
    labels = [[o["label"] for o in one["objects"]] for one in written["pictures"]]
    assert labels == [["A", "K"], ["M", None], ["S"], ["K", "A", "M"], [None]]
    assert not (tmp_path / "pictures").exists()
    assert recognise(matcher_for(encoder, data), Scenes((), (), (), ()), tmp_path / "none")["pictures"] == 0
    assert json.loads((tmp_path / "none" / "matches.json").read_text())["pictures"] == []


def test_a_sheet_holds_every_picture() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    page = np.array(sheet([Image.new("RGB", (40, 20 + 10 * i), c) for i, c in enumerate(colours)], columns=2, width=80))
    assert page.shape[1] == 2 * 88 + 8
    areas = [int((page == np.array(colour)).all(2).sum()) for colour in colours]
    assert areas == [80 * 40, 80 * 60, 80 * 80]


# ---- judging


def test_given_boxes_are_judged_by_hand(encoder: Encoder, data: Path) -> None:
    judged = judge(matcher_for(encoder, data), read_truth(data / "truth.csv"), boxes="given")
    names = [judged.classes[i] for i in judged.units.tolist()]
    assert names == list("".join(SCENES))
    assert int(judged.objects.sum()) == len(names) == 9
    assert judged.enrolled.tolist() == [name != "Q" for name in names]
    assert judged.right.tolist() == judged.accepted.tolist() == judged.enrolled.tolist()
    metrics = measure(judged)
    assert [metrics[name].value for name in ("precision", "recall", "f1", "fpir", "recall_macro", "box_recall")] == [
        *(1.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    ]
    assert metrics["f1"].n == 5
    careless = judge(matcher_for(encoder, data, threshold=-1.0), read_truth(data / "truth.csv"), boxes="given")
    worse = measure(careless)
    assert worse["precision"].value == pytest.approx(7 / 9)  # both Q are taken for something
    assert worse["fpir"].value == 1.0
    assert worse["f1"].value == pytest.approx(2 * 7 / (9 + 7))
    difference = compare(careless, judged)
    assert difference["f1"].value == pytest.approx(1 - 14 / 16)
    assert difference["fpir"].value == -1.0


def test_found_boxes_are_judged_by_hand(encoder: Encoder, data: Path) -> None:
    x0, y0, x1, y1 = place(0)
    find = fixed(
        (x0 + 4, y0, x1 + 4, y1),  # on the first letter
        (x0 - 4, y0, x1 - 4, y1 - 3),  # on the same, worse: thinned out by the overlap
        (x0 + 40, y0, x1 + 40, y1),  # between two letters: IoU below one half with either
        place(2),
    )
    judged = judge(matcher_for(encoder, data, find, threshold=-1.0), read_truth(data / "truth.csv"), boxes="found")
    # three boxes a picture; a first letter in each of five, a third in one
    assert judged.found[judged.objects].tolist() == [True, False, True, False, True, True, False, True, True]
    assert int((~judged.objects).sum()) == 5 * 3 - 6
    metrics = measure(judged)
    assert metrics["box_recall"].value == pytest.approx(6 / 9)
    assert metrics["box_precision"].value == pytest.approx(6 / 15)
    right = int(judged.right.sum())
    assert metrics["precision"].value == pytest.approx(right / 15)  # all fifteen are accepted
    assert metrics["recall"].value == pytest.approx(right / 7)
    assert metrics["fpir"].value == pytest.approx(10 / 11)  # nine boxes on nothing and two Q, of which one has no box
    with pytest.raises(InputError, match="not asked about the same boxes"):
        compare(judged, judge(matcher_for(encoder, data), read_truth(data / "truth.csv"), boxes="given"))


def test_halves_enrolled_in_turn_are_one_judgement(encoder: Encoder, data: Path) -> None:
    references = read_folder(data / "references")
    truth = read_truth(data / "truth.csv")
    halves = []
    for half in ("AK", "MS"):
        mine = references.where([label in half for label in references.column("label")]).compact()
        matcher = ObjectMatcher(fixed(place(0)), embedding_model=encoder, references=mine, threshold=0.9, margin=0.0)
        halves.append(judge(matcher, truth, boxes="found"))
    both = Judged.together(*halves)
    metrics = measure(both)
    assert len(both.found) == sum(len(half.found) for half in halves)
    assert metrics["box_recall"].value == measure(halves[0])["box_recall"].value == pytest.approx(5 / 9)
    hits = sum(int((half.accepted & half.right).sum()) for half in halves)
    assert metrics["recall"].value == pytest.approx(hits / 7)
    with pytest.raises(ValueError, match="different pictures"):
        Judged.together(halves[0], judge(matcher, truth.drawn(2, 0), boxes="given"))


def test_an_object_takes_one_box_and_a_box_one_object(encoder: Encoder, data: Path) -> None:
    from vicinal.recognise import _one_to_one
    from vicinal.serving.objects import Answer, Detection

    generator = np.random.default_rng(0)
    for _ in range(50):
        corners = generator.uniform(0, 60, (9, 2))
        boxes = [(*c, *(c + generator.uniform(20, 60, 2))) for c in corners]
        objects = tuple(Detection(box, float(s)) for box, s in zip(boxes[:5], generator.random(5), strict=True))
        taken = _one_to_one(Answer("", (120, 120), objects), boxes[5:])
        free, expected = set(range(4)), [None] * 4
        for i in sorted(range(5), key=lambda i: -objects[i].box_score):  # by hand
            best, at = max(((_iou(objects[i].box, boxes[5 + j]), -j) for j in free), default=(0, 0))
            if best >= 0.5:
                expected[-at] = i
                free.discard(-at)
        assert taken == expected


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    both = width * height
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return both / (sum(areas) - both)


def test_a_picture_that_cannot_be_read_is_missed_and_counted(encoder: Encoder, data: Path, tmp_path: Path) -> None:
    scenes = read_truth(data / "truth.csv")
    (tmp_path / "torn.png").write_bytes(b"")
    torn = Scenes((tmp_path / "torn.png", *scenes.paths[1:]), *_columns(scenes)[1:])
    for boxes in ("given", "found"):
        matcher = matcher_for(encoder, data, fixed(place(0)))
        judged = judge(matcher, torn, boxes=boxes)
        assert judged.found[:2].tolist() == [False, False]
        assert [Path(name).name for name, _ in judged.left_out] == ["torn.png"]
    assert math.isclose(measure(judged)["box_recall"].value, 4 / 9)


def test_bad_input_is_named(encoder: Encoder, data: Path, tmp_path: Path) -> None:
    truth = read_truth(data / "truth.csv")
    strange = Scenes(*_columns(truth)[:3], tuple(tuple(f"{x.lower()}a" for x in labels) for labels in truth.labels))
    with pytest.raises(InputError, match=r"not one of the 5 classes of the truth \(aa, ka"):
        judge(matcher_for(encoder, data), strange, boxes="given")
    with pytest.raises(InputError, match="no references"):
        judge(ObjectMatcher(embedding_model=encoder), truth, boxes="given")
    with pytest.raises(InputError, match="no run folder"):
        starting_model(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "truth.csv").write_text("image\na.png\n")
    with pytest.raises(InputError, match="label"):
        read_truth(tmp_path / "truth.csv")


def test_a_baseline_is_what_the_run_began_with(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "model").parent.mkdir(exist_ok=True)
    encoder.save(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(
        "data: {folder: photos}\nmodel: vicinal:nano\npreprocess: {size: 48, crop: pad}\n"
        "split: {class_disjoint: {holdout: 0.5, seed: 1}}\nadapt: [{lora: {rank: 2}}]\nloss: {arcface: {}}\n"
    )
    opened = open_models([str(tmp_path)], baseline=True)
    start, tuned = opened.values()
    assert list(opened)[1] == str(tmp_path)
    assert start.preprocess.crop == "pad"
    assert tuned.fingerprint() == encoder.fingerprint()
    with (tmp_path / "recipe.yaml").open("a") as recipe:
        recipe.write("random_init: true\n")
    with pytest.raises(InputError, match="random weights, which are gone"):  # others than the run's would be drawn
        open_models([str(tmp_path)], baseline=True)


# ---- the command


def test_match_writes_a_folder(data: Path, tmp_path: Path) -> None:
    words = ["match", str(data / "scenes"), "--references", str(data / "references"), "--model", "vicinal:nano"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "-t", "0.99"])
    assert result.exit_code == 0, result.output
    assert "5 pictures" in result.output
    assert len(list((tmp_path / "out" / "pictures" / "shop").iterdir())) == 5
    assert json.loads((tmp_path / "out" / "matches.json").read_text())["about"]["detector"] == "tiles"
    table = CliRunner().invoke(
        app,
        [
            "match",
            str(data / "truth.csv"),
            *words[2:],
            "--margin",
            "0",
            "--out",
            str(tmp_path / "table"),
            "--no-pictures",
        ],
    )
    assert "9 objects: 9 known" in table.output
    assert "no threshold" in table.output
    for source in ("voc", "truth.json"):
        again = CliRunner().invoke(
            app,
            ["match", str(data / source), *words[2:], "--margin", "0", "--out", str(tmp_path / "voc"), "--no-pictures"],
        )
        assert "9 objects: 9 known" in again.output, source
    one = CliRunner().invoke(
        app,
        ["match", str(data / "scenes" / "shop" / "0.png"), *words[2:], "--out", str(tmp_path / "one"), "-t", "0.99"],
    )
    assert "1 pictures" in one.output


def test_match_measures_models_on_the_truth(data: Path, tmp_path: Path, encoder: Encoder) -> None:
    encoder.save(tmp_path / "other")
    words = ["match", "--truth", str(data / "truth.csv"), "--references", str(data / "references"), "-n", "50"]
    words += ["-e", "vicinal:nano", "-e", str(tmp_path / "other"), "--matching-method", "multi-ref", "--seed", "42"]
    words += ["--margin", "0"]
    json_out = tmp_path / "metrics.json"
    result = CliRunner().invoke(app, [*words, "-t", "0.9", "-t", "-1", "--json", str(json_out)])
    assert result.exit_code == 0, result.output
    assert "5 pictures, 9 objects of 5 classes; 7 have references; multi-ref" in result.output
    written = json.loads(json_out.read_text())
    assert written["given"]["vicinal:nano"]["f1"]["value"] == 1.0
    assert written["given"]["difference"]["fpir"]["value"] == 1.0
    assert written["thresholds"] == {"vicinal:nano": 0.9, str(tmp_path / "other"): -1.0}


def test_match_refuses_what_cannot_be(data: Path, tmp_path: Path, encoder: Encoder) -> None:
    words = ["match", "--truth", str(data / "truth.csv"), "--references", str(data / "references")]

    def refused(*more: str) -> str:
        result = CliRunner().invoke(app, [*words, "--model", "vicinal:nano", *more])
        assert isinstance(result.exception, InputError), result.output
        return str(result.exception)

    rule = OpenSetThreshold().fit(
        [0.9, 0.3], [True, False], fingerprint=encoder.fingerprint(), settings={"fusion": "mean"}
    )
    rule.save(tmp_path / "threshold.json")
    assert "fitted with fusion='mean'" in refused("-t", str(tmp_path / "threshold.json"), "--fusion", "max")
    assert "'median' is unknown; there are max, mean" in refused("--fusion", "median")
    assert "3 thresholds for 1 models" in refused("-t", "0.1", "-t", "0.2", "-t", "0.3")
    assert "finds no boxes" in refused("--detector", str(Path(vicinal_nano())))
    assert "'abc' is neither a number nor a file" in refused("-t", "abc")
    (tmp_path / "other.json").write_text("{}")
    assert "is not a file of an open-set threshold" in refused("-t", str(tmp_path / "other.json"))
    assert "one of the two" in refused(str(data / "scenes"))
    assert "k and min_votes must be at least 1, not 0" in refused("--k", "0")
    assert "pad is 0 or more" in refused("--pad", "-1")


def test_an_object_is_not_its_own_reference(data: Path, tmp_path: Path) -> None:
    """By its box, or as a whole picture; another object of the same picture is another one."""
    rows = read_table(data / "truth.csv")
    whole = Manifest.build({"image": ["scenes/shop/0.png"], "label": ["A"]}, data)
    for name, references in (("own", rows), ("whole", whole), ("others", rows.where(np.arange(9) == 0))):
        write_table(references, tmp_path / f"{name}.csv")
    write_table(rows.where(np.arange(9) > 0), tmp_path / "truth.csv")

    def asked(name: str) -> Result:
        words = ["--truth", str(tmp_path / "truth.csv"), "--references", str(tmp_path / f"{name}.csv")]
        return CliRunner().invoke(app, ["match", *words, "-e", "vicinal:nano"])

    assert "5 pictures of the truth are references too" in str(asked("own").exception)
    assert "1 pictures of the truth are references too" in str(asked("whole").exception)
    found = asked("others")
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("kind", ["index", "matcher"])
def test_an_object_that_is_its_own_reference_in_a_file_of_vectors_is_said(
    data: Path, tmp_path: Path, encoder: Encoder, kind: str
) -> None:
    def asked(name: str, references: Manifest) -> str:
        vectors, file = embed(encoder, references, device="cpu"), tmp_path / f"{name}.{kind}"
        if kind == "index":
            index = Index(encoder.fingerprint())
            index.add(vectors, fingerprint=encoder.fingerprint())
            index.save(file)
        else:
            Matcher(vectors, fingerprint=encoder.fingerprint()).save(file)
        words = ["match", "--truth", str(data / "truth.csv"), "--references", str(file), "-e", "vicinal:nano"]
        result = CliRunner().invoke(app, [*words, "--device", "cpu", "--json", str(tmp_path / "m.json")])
        assert result.exit_code == 0, result.output
        return result.output

    own = read_table(data / "truth.csv").where(np.arange(9) == 5)  # K in the fourth picture
    said = asked("own", own)
    assert "1 pictures hold an object that is all but equal to a reference" not in asked("others", _larger(data))
    assert json.loads((tmp_path / "m.json").read_text())["alike"] == []
    assert "pictures hold an object that is all but equal to a reference" in said
    assert "scenes/shop/3.png" in said or "scenes/shop/0.png" in said  # both show that very card


def _larger(data: Path) -> Manifest:
    """References that are in no scene: those of 64 pixels."""
    rows = read_folder(data / "references")
    return rows.where([name.endswith("1.png") for name in rows.column("image")])


def test_a_metric_that_is_undefined_says_why(data: Path, tmp_path: Path) -> None:
    write_table(read_table(data / "truth.csv").where(np.arange(9) < 3), tmp_path / "known.csv")  # A, K and M
    words = ["match", "--truth", str(tmp_path / "known.csv"), "--references", str(data / "references")]
    result = CliRunner().invoke(app, [*words, "-e", "vicinal:nano", "-t", "2"])
    assert result.exit_code == 0, result.output
    assert " nan" not in result.output
    assert "precision undefined" in result.output
    assert "precision is undefined: nothing is accepted" in result.output
    assert "fpir is undefined: nothing asked about is unknown" in result.output


def test_the_page_says_what_runs(
    data: Path, tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "recognise.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for kind, code in found if kind == "bash" for line in code.splitlines()]
    assert len(lines) == 3
    for line in lines:
        command = typer.main.get_command(app).commands["match"]  # type: ignore[attr-defined]
        assert command.make_context("match", shlex.split(line)[2:]).params["references"] == Path("brands")
    [code] = [code for kind, code in found if kind == "python"]
    monkeypatch.chdir(tmp_path)
    yolos(tmp_path / "models" / "detector")
    encoder.save(tmp_path / "runs" / "logos" / "model")
    (tmp_path / "brands").symlink_to(data / "references")
    (tmp_path / "photos").mkdir()
    for n in (1, 2):
        Image.new("RGB", (80, 60)).save(tmp_path / "photos" / f"{n}.jpg")
    defaults = {name: p.default for name, p in inspect.signature(Matcher).parameters.items()}
    settings = {**defaults, "fusion": "topk"}
    settings = {name: settings[name] for name in ("fusion", "k", "min_votes", "vote_threshold", "margin")}
    rule = OpenSetThreshold().fit(
        [0.9, 0.3],
        [True, False],
        fingerprint=encoder.fingerprint(),
        settings={**settings, "normalisation": None, "cohort": None},
    )
    rule.save(tmp_path / "threshold.json")
    exec(compile(code, "recognise.md", "exec"), {})
    assert capsys.readouterr().out.count("photos/") == 2


def vicinal_nano() -> str:
    from vicinal.models import backbones

    return str(Path(backbones.__file__).parent / "nano")


def test_real_scenes_are_found_by_their_boxes(real_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    truth = read_truth(real_data / "logo_scenes", count=6, seed=1)
    encoder = load_encoder("vicinal:nano")
    references = read_references(real_data / "logo_scenes" / "references.csv")
    assert isinstance(references, Manifest)
    labels = {label for some in truth.labels for label in some}
    mine = references.where([label in labels for label in references.column("label")]).compact()
    judged = judge(ObjectMatcher(embedding_model=encoder, references=mine), truth, boxes="given")
    assert isinstance(judged, Judged)
    assert judged.found.all()
    assert judged.enrolled.all()
    assert not judged.left_out
