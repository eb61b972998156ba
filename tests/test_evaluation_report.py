"""The page says what the record says, loads nothing, survives what is missing; its closeups equal plain loops."""

# ruff: noqa: RUF001  the page says minus, dash and times with their own signs

from __future__ import annotations

import base64
import copy
import io
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vicinal.evaluation import closeups
from vicinal.evaluation.charts import Series, density, panel, thin, ticks
from vicinal.evaluation.report import Record, _hero, _part_tables, report
from vicinal.evaluation.wording import as_change, as_number, counted
from vicinal.types import Embeddings

VOID = {"meta", "link", "img", "br", "col"}
NASTY = "<script>alert('x')</script>\"&amp;"


class Page(HTMLParser):
    """What a browser would find: text, attributes, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if t == tag and n == name]

    @property
    def sections(self) -> list[str]:
        return self.values("section", "id")


def estimate(
    value: float | None, low: float | None, high: float | None, n: int = 40, queries: int = 160
) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n, "queries": queries}


def scores(base: float) -> dict[str, dict[str, Any]]:
    names = ("recall@1", "recall@5", "map@r", "r_precision", "accuracy@1shot", "accuracy@10shot")
    return {m: estimate(base + i / 97, base + i / 97 - 0.021, base + i / 97 + 0.032) for i, m in enumerate(names)}


def changes(base: float) -> dict[str, dict[str, Any]]:
    return {m: estimate(e["value"], e["low"], e["high"]) for m, e in scores(base).items()}


def embeddings(classes: int = 12, each: int = 4, dim: int = 16, *, noise: float = 1.0, seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    vectors = centres[labels] + noise * torch.randn(len(labels), dim, generator=generator)
    return Embeddings(
        torch.nn.functional.normalize(vectors, dim=1),
        labels,
        tuple(f"images/{i}.png" for i in range(len(labels))),
        tuple(f"kind {c}" for c in range(classes)),
    )


def picture(name: str) -> Image.Image:
    shade = int(name.split("/")[1].split(".")[0]) * 5 % 256
    return Image.new("RGB", (120, 80), (shade, 90, 255 - shade))


def nothing(name: str) -> None:
    return None


def full_record() -> Record:
    history: list[dict[str, Any]] = []
    for step in range(1, 61):
        history.append({"step": step, "loss": 5 / step, "lr": 1e-3 * (1 - step / 60), "images_per_second": 9.0})
        if step % 20 == 0:
            history.append({"step": step, "val": {"recall@1": 0.1 * step / 20, "map@r": 0.3 + step / 1000}})
    results = {
        "before": {"seen": scores(0.311), "unseen": scores(0.203), "joint": scores(0.152)},
        "after": {"seen": scores(0.613), "unseen": scores(0.404), "joint": scores(0.355)},
        "difference": {"seen": changes(0.302), "unseen": changes(0.201), "joint": changes(0.203)},
        "environment": {"device": "a processor", "versions": {"torch": "2.15.0"}},
        "data": {
            "images": 960,
            "classes": 80,
            "train_images": 640,
            "skipped": ["bad/one.png", ["bad/two.png", "truncated"]],
            "notes": ["seven classes were kept back"],
        },
        "training": {
            "steps": 60,
            "best_step": 40,
            "trained_parameters": 92_160,
            "total_parameters": 5_616_576,
            "seconds": 200.0,
            "wise_ft": {"weight": 0.5, "curve": [{"weight": w, "map@r": 0.3 + w / 9} for w in (0.0, 0.5, 1.0)]},
        },
        "model": {"source": "timm:some_model", "licence": "Apache-2.0", "size": [112, 112]},
        "seed": 42,
    }
    return Record(
        results=results,
        history=history,
        recipe="model: timm:some_model\nmonitor: map@r\nsteps: 60\n",
        before={"unseen": embeddings(noise=1.8), "seen": embeddings(noise=1.5, seed=1)},
        after={"unseen": embeddings(noise=1.4, seed=9), "seen": embeddings(noise=0.9, seed=2)},
    )


@pytest.fixture(scope="module")
def html() -> str:
    return report(full_record(), picture)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


# ------------------------------------------------------------------------------------------------------ what it says


def test_every_number_of_the_record_is_on_the_page(page: Page):
    results = full_record().results
    seen = 0
    for side, show in (("before", as_number), ("after", as_number), ("difference", as_change)):
        for metrics in results[side].values():
            for e in metrics.values():
                assert f"{show(e['value'])} [{show(e['low'])}, {show(e['high'])}]" in page.text
                seen += 1
    assert seen == 3 * 3 * 6
    assert page.text.count("40 · 160") == 3 * 6  # classes and queries of every row


def test_all_sections_are_there_and_reachable(page: Page):
    assert page.sections == [
        "results", "neighbours", "classes", "prototypes", "similarity", "training", "record", "reading",
    ]  # fmt: skip
    targets = page.values("a", "href")
    assert sorted(targets) == sorted(f"#{name}" for name in page.sections)


def test_facts_of_the_record_are_on_the_page(page: Page):
    for words in (
        "timm:some_model", "licence: Apache-2.0", "960 images", "80 classes", "1.6 % of 5.62 M", "92,160", "3.3 min",
        "seven classes were kept back", "2 images were skipped", "bad/one.png", "bad/two.png: truncated", "2.15.0",
        "monitor: map@r", "with seed 42", "chosen: step 40", "chosen: 0.5", "Validation MAP@R", "T = 0.05",
        "AUROC", "112 × 112",
    ):  # fmt: skip
        assert words in page.text, words


HEADLINES = {
    "better": (
        {"unseen": (estimate(0.232, 0.21, 0.25, 723, 1893), estimate(0.514, 0.49, 0.53, 723, 1893), (0.27, 0.29))},
        "On 723 classes the model never saw, MAP@R rose from .232 to .514: +.282 [+.270, +.290]",
        "the adapted model is better here. Measured on 1,893 queries of 723 classes.",
    ),
    "worse": (
        {"unseen": (estimate(0.9, 0.8, 0.95, 20, 50), estimate(0.8, 0.7, 0.9, 20, 50), (-0.14, -0.06))},
        "On 20 classes the model never saw, MAP@R fell from .900 to .800: −.100 [−.140, −.060]",
        "the adapted model is worse here",
    ),
    "cannot tell": (
        {"unseen": (estimate(0.5, 0.4, 0.6), estimate(0.51, 0.4, 0.6), (-0.02, 0.04))},
        "MAP@R went from .500 to .510: +.010 [−.020, +.040]",
        "The 95 % interval holds zero: these data cannot tell the change from none.",
    ),
    "a fall that may be none": (
        {"unseen": (estimate(0.5, 0.4, 0.6), estimate(0.48, 0.4, 0.6), (-0.05, 0.01))},
        "MAP@R went from .500 to .480: −.020 [−.050, +.010]",
        "The 95 % interval holds zero",
    ),
    "one class, no interval": (
        {"unseen": (estimate(0.5, None, None, 1, 8), estimate(0.75, None, None, 1, 8), (None, None))},
        "On 1 class the model never saw, MAP@R went from .500 to .750: +.250 The difference has no interval",
        "Measured on 8 queries of 1 class.",
    ),
    "only all": (
        {"all": (estimate(0.5, 0.4, 0.6, 81, 900), estimate(0.7, 0.6, 0.8, 81, 900), (0.15, 0.25))},
        "On new images of 81 classes, MAP@R rose from .500 to .700: +.200 [+.150, +.250]",
        "better here",
    ),
    "only seen": (
        {"seen": (estimate(0.5, 0.4, 0.6), estimate(0.7, 0.6, 0.8), (0.15, 0.25))},
        "On new images of 40 classes the model was trained on, MAP@R rose from .500 to .700",
        "better here",
    ),
    "a loss elsewhere is said in the same breath": (
        {
            "unseen": (estimate(0.5, 0.4, 0.6), estimate(0.7, 0.6, 0.8), (0.15, 0.25)),
            "seen": (estimate(0.9, 0.8, 0.95), estimate(0.85, 0.8, 0.9), (-0.08, -0.02)),
            "joint": (estimate(0.4, 0.3, 0.5), estimate(0.41, 0.3, 0.5), (-0.01, 0.03)),
        },
        "Elsewhere, MAP@R: seen classes .900 to .850 (−.050 [−.080, −.020]); all classes together .400 to .410 "
        "(+.010 [−.010, +.030], not distinguishable from zero).",
        "On 40 classes the model never saw",
    ),
    "nothing before": ({"all": (None, estimate(0.7, 0.6, 0.8), None)}, "On 40 classes, MAP@R is .700 [.600, .800]", ""),
    "nothing at all": ({}, "Nothing was measured", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADLINES)
def test_headline_is_honest(case: str):
    parts, sentence, more = HEADLINES[case]
    results: dict[str, Any] = {"before": {}, "after": {}, "difference": {}}
    for part, (before, after, interval) in parts.items():
        for side, value in (("before", before), ("after", after)):
            if value is not None:
                results[side][part] = {"map@r": value}
        if interval is not None:
            change = after["value"] - before["value"]
            results["difference"][part] = {"map@r": estimate(change, *interval, before["n"], before["queries"])}
    text = Page(report(Record(results), nothing)).text
    assert sentence in text
    assert more in text
    better = {"better", "only all", "only seen", "a loss elsewhere is said in the same breath"}
    assert ("better here" in text) == (case in better)


def test_headline_takes_another_metric_where_map_at_r_is_unknown():
    unknown = estimate(None, None, None)
    results = {
        "before": {"all": {"map@r": unknown, "recall@1": estimate(0.5, 0.4, 0.6)}},
        "after": {"all": {"map@r": unknown, "recall@1": estimate(0.6, 0.5, 0.7)}},
        "difference": {"all": {"map@r": unknown, "recall@1": estimate(0.1, 0.05, 0.15)}},
    }
    text = Page(report(Record(results), nothing)).text
    assert "Recall@1 rose from .500 to .600" in text
    assert "MAP@R –" in text  # the table says that it is unknown


def test_dots_and_whiskers_stand_where_their_axis_says():
    results = full_record().results
    tables = _part_tables(results)
    hero = _hero(results)
    assert hero is not None
    assert [t["id"] for t in tables] == [row["part"] for row in hero["rows"]] == ["unseen", "seen", "joint"]
    checked = 0

    def check(whisker: Any, axis: list[dict[str, Any]], e: dict[str, Any]) -> None:  # noqa: ANN401
        nonlocal checked
        (a, b), (x, y) = ([float(t["label"].replace("−", "-")) for t in axis[:2]], [t["at"] for t in axis[:2]])
        for place, key in ((whisker.at, "value"), (whisker.low, "low"), (whisker.high, "high")):
            assert place == pytest.approx(x + (e[key] - a) / (b - a) * (y - x), abs=0.03), key
        checked += 1

    for table, drawn in zip(tables, hero["rows"], strict=True):
        for row in table["rows"]:
            before, after, change = (results[s][table["id"]][row["name"]] for s in ("before", "after", "difference"))
            check(row["values"][0], table["axis"], before)
            check(row["values"][1], table["axis"], after)
            check(row["change"], table["change_axis"], change)
            assert [w.style for w in (*row["values"], row["change"])] == ["before", "after", "up"]
        for side in ("before", "after"):
            check(drawn[side], hero["axis"], results[side][table["id"]]["map@r"])
    assert checked == 3 * 6 * 3 + 3 * 2


def test_a_single_run_says_that_seeds_are_not_in_its_interval(page: Page):
    assert "another training seed would change is not in them" in page.text
    assert "fewer than 20 classes" not in page.text
    few = {"before": {"all": {"map@r": estimate(0.5, 0.4, 0.6, n=12)}}}
    assert "fewer than 20 classes" in Page(report(Record(few), nothing)).text


# -------------------------------------------------------------------------------------------- one file, safe, the same


def test_nothing_is_loaded_from_anywhere(html: str, page: Page):
    loads = [v for _, name, v in page.attributes if name in ("src", "href", "srcset", "xlink:href", "poster", "action")]
    assert len(loads) > 100
    assert all(v.startswith(("#", "data:")) for v in loads)
    assert {"script", "iframe", "object", "embed", "base"}.isdisjoint(page.tags)
    assert not re.search(r"url\(|@import|https?://", html)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def test_strings_of_the_user_are_escaped():
    given = full_record()
    results = copy.deepcopy(dict(given.results))
    results["data"]["notes"] = [NASTY]
    results["data"]["skipped"] = [[NASTY, NASTY]]
    results["model"]["source"] = NASTY
    results["environment"] = {NASTY: NASTY}
    results["before"][NASTY] = scores(0.2)
    hostile = {
        name: Embeddings(
            e.vectors, e.labels, tuple(f"{i} {NASTY}" for i in e.ids), tuple(f"{c} {NASTY}" for c in e.classes)
        )
        for name, e in given.before.items()
    }
    page = Page(report(Record(results, given.history, NASTY, hostile, {}), nothing))
    assert "script" not in page.tags
    assert page.text.count(NASTY) > 100  # escaped once, not twice
    assert any(NASTY in title for title in page.values("div", "title"))


def test_same_record_same_bytes_and_another_seed_other_samples(html: str):
    assert report(full_record(), picture) == html
    given = full_record()
    other = Record({**given.results, "seed": 43}, given.history, given.recipe, given.before, given.after)
    assert Page(report(other, picture)).values("div", "title") != Page(html).values("div", "title")


def test_rows_are_matched_by_id_not_by_place(html: str):
    given = full_record()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
    shuffled = {
        name: Embeddings(e.vectors[order], e.labels[order], tuple(e.ids[i] for i in order), e.classes)
        for name, e in given.after.items()
    }
    assert report(Record(given.results, given.history, given.recipe, given.before, shuffled), picture) == html


def test_page_stays_small_with_pictures_that_do_not_compress():
    noise = Image.effect_noise((500, 400), 120).convert("RGB")
    html = report(full_record(), lambda name: noise)
    assert 500_000 < len(html) < 3_000_000


def test_pictures_stop_at_their_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(closeups, "PICTURE_BYTES", 20_000)
    html = report(full_record(), picture)
    used = sum(len(v) for v in Page(html).values("img", "src"))
    assert 10_000 < used < 40_000  # headers of the heat map are written once for each panel
    assert "left out to keep the page small" in html


def test_pictures_are_small_jpegs_with_transparency_over_white():
    def drawn(name: str) -> Image.Image:
        return Image.new("RGBA", (300, 150), (255, 0, 0, 0))

    uri = closeups.Album(drawn).uri("a")
    assert uri is not None
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert image.size == (96, 48)
    assert image.getpixel((40, 20)) == (255, 255, 255)


def contrast(one: str, two: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_read_in_light_and_dark(html: str):
    blocks = re.findall(r":root\{([^}]*)\}", html)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", block))
        for name in ("ink", "ink2", "after", "hit", "miss"):  # text: WCAG AA
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        for name in ("ink3", "before"):  # axis labels and marks
            assert contrast(colours[name], colours["paper"]) >= 3, name


# ------------------------------------------------------------------------------------------------------ what is missing


def without(record: Record, what: str) -> Record:
    results = copy.deepcopy(dict(record.results))
    given = {"history": record.history, "recipe": record.recipe, "before": record.before, "after": record.after}
    match what:
        case "history" | "recipe" | "before" | "after":
            given[what] = type(given[what])()
        case "all embeddings":
            given["before"] = given["after"] = {}
        case "seen":
            given["before"], given["after"] = ({"unseen": given[s]["unseen"]} for s in ("before", "after"))
            for side in ("before", "after", "difference"):
                del results[side]["seen"]
        case "everything but one measurement":
            return Record({"before": {"all": results["before"]["seen"]}})
        case "after, wholly":
            given["after"] = {}
            del results["after"], results["difference"]
        case _:
            del results[what]
    return Record(results, **given)


MISSING = {
    "history": set(),  # the interpolation's curve is still there
    "recipe": set(),
    "before": {"classes"},
    "after": {"classes"},
    "all embeddings": {"neighbours", "classes", "prototypes", "similarity"},
    "seen": set(),
    "difference": set(),
    "environment": set(),
    "data": set(),
    "training": set(),
    "model": set(),
    "seed": set(),
    "after, wholly": {"classes"},
    "everything but one measurement": {"neighbours", "classes", "prototypes", "similarity", "training", "record"},
}


@pytest.mark.parametrize("what", MISSING)
def test_missing_parts_leave_the_rest(what: str, page: Page):
    left = Page(report(without(full_record(), what), picture))
    assert left.sections == [name for name in page.sections if name not in MISSING[what]]
    assert set(left.values("a", "href")) == {f"#{name}" for name in left.sections}
    assert "None" not in left.text
    assert "nan" not in left.text.lower().split()


@pytest.mark.parametrize("fails", ["none", "raises"])
def test_pictures_that_cannot_be_had_are_said(fails: str):
    def broken(name: str) -> Image.Image | None:
        if fails == "raises":
            raise OSError(f"{name} went away")
        return None

    page = Page(report(full_record(), broken))
    assert "img" not in page.tags
    assert "image" not in page.tags
    assert "no picture" in page.text
    assert re.search(r"\d+ pictures could not be opened", page.text)


ODD = {
    "one class": (torch.zeros(5, dtype=torch.int64), True),
    "every class has one image": (torch.arange(5), False),
    "two images": (torch.tensor([0, 0]), True),
    "one image": (torch.tensor([0]), False),
    "one pair and one alone": (torch.tensor([0, 0, 1]), True),
    "nothing": (torch.zeros(0, dtype=torch.int64), False),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_parts(case: str):
    labels, neighbours = ODD[case]
    vectors = torch.nn.functional.normalize(
        torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(1)), dim=1
    )
    e = Embeddings(vectors, labels, tuple(f"images/{i}.png" for i in range(len(labels))), tuple("abcde"))
    page = Page(report(Record({}, before={"unseen": e}, after={"unseen": e}), picture))
    assert ("neighbours" in page.sections) == neighbours
    alone = int((torch.bincount(labels, minlength=5) == 1).sum())
    assert (f"{alone} unseen class" in page.text) == (alone > 0)


def test_ids_that_only_one_side_has_are_left_out():
    before, after = embeddings(), embeddings(noise=0.5)
    fewer = after.where(after.labels != 3)
    (view,) = closeups.views({"unseen": before}, {"unseen": fewer}, 0)
    assert view.first.ids == view.last.embeddings.ids == fewer.ids


# ------------------------------------------------------------------------------------------- closeups and plain loops


@pytest.fixture(scope="module")
def view() -> closeups.View:
    (found,) = closeups.views({"unseen": embeddings(noise=1.8)}, {"unseen": embeddings(noise=1.4, seed=9)}, 3)
    return found


def by_hand(e: Embeddings) -> list[list[int]]:
    """All other rows of each row, nearest first."""
    x = e.vectors.double()
    return [sorted((j for j in range(len(e)) if j != i), key=lambda j: -float(x[i] @ x[j])) for i in range(len(e))]


def test_neighbours_and_map_at_r(view: closeups.View):
    assert len(view.pool) == view.eligible == 48
    for side in view.sides:
        labels = side.embeddings.labels.tolist()
        for position, (row, nearest) in enumerate(zip(view.pool.tolist(), by_hand(side.embeddings), strict=True)):
            assert side.rows[position].tolist() == nearest[:5]
            assert bool(side.hit[position]) == (labels[nearest[0]] == labels[row])
            right = [labels[j] == labels[row] for j in nearest[:3]]
            expected = sum(sum(right[: i + 1]) / (i + 1) for i in range(3) if right[i]) / 3
            assert float(side.map_at_r[position]) == pytest.approx(expected, abs=1e-6)


def test_gallery_shows_every_outcome_and_counts_them_all(view: closeups.View):
    found = closeups.gallery(view, closeups.Album(nothing), 3)
    before, after = (side.hit for side in view.sides)
    expected = {"gained": ~before & after, "lost": before & ~after, "wrong": ~before & ~after, "kept": before & after}
    assert {g["key"]: g["count"] for g in found["groups"]} == {k: int(m.sum()) for k, m in expected.items()}
    assert sum(g["count"] for g in found["groups"]) == found["queries"] == 48
    assert all(g["count"] for g in found["groups"])
    for group in found["groups"]:
        assert len(group["rows"]) == min(group["count"], {"gained": 4, "lost": 3, "wrong": 3, "kept": 1}[group["key"]])
        for row in group["rows"]:
            first = [side["neighbours"][0]["hit"] for side in row["sides"]]
            assert first == {"gained": [0, 1], "lost": [1, 0], "wrong": [0, 0], "kept": [1, 1]}[group["key"]]
            for side in row["sides"]:
                assert row["query"]["id"] not in [n["id"] for n in side["neighbours"]]
                assert all(n["hit"] == (n["label"] == row["query"]["label"]) for n in side["neighbours"])


def test_outlines_and_badges_say_hit_where_the_class_is_the_querys(html: str):
    cases = html.split('<div class="case">')[1:]
    assert len(cases) == 18
    for case in cases:
        (kind, query), *neighbours = re.findall(r'<div class="tile (\w*)" title="images/(\d+).png">', case)
        assert (kind, len(neighbours)) == ("", 10)
        badges = re.findall(r'aria-hidden="true">([✓✕])</b>', case)
        for (kind, row), badge in zip(neighbours, badges, strict=True):
            same = int(row) // 4 == int(query) // 4  # four images a class
            assert (kind, badge) == (("hit", "✓") if same else ("miss", "✕"))


def test_outline_is_told_by_more_than_colour(page: Page):
    assert page.text.count("✓") > 10
    assert page.text.count("✕") > 10
    assert page.text.count("hit:") + page.text.count("miss:") == 5 * 2 * len(
        [c for c in page.values("div", "class") if c == "case"]
    )


def test_heat_map_and_mean_cosine(view: closeups.View):
    found = closeups.heat(view, closeups.Album(nothing), 3)
    assert found is not None
    assert len(found["tiles"]) == 8
    classes = [int(t["label"].split()[1]) for t in found["tiles"]]
    for shown, side in zip(found["sides"], view.sides, strict=True):
        x, y = side.embeddings.vectors.double(), side.embeddings.labels
        mu = [x[y == c].mean(0) / x[y == c].mean(0).norm() for c in range(12)]
        pairs = [float(mu[a] @ mu[b]) for a in range(12) for b in range(12) if a != b]
        assert shown["mean"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
        for i, a in enumerate(classes):
            for j, b in enumerate(classes):
                assert shown["cells"][i][j] == pytest.approx(float(mu[a] @ mu[b]), abs=1e-6)


def test_entropy_of_the_softmax_over_prototypes(view: closeups.View):
    found = closeups.entropy(view)
    assert found is not None
    for shown, side in zip(found["rows"], view.sides, strict=True):
        x, y = side.embeddings.vectors.double(), side.embeddings.labels.tolist()
        nats = []
        for i in range(48):
            logits = []
            for c in range(12):
                members = [x[j] for j in range(48) if y[j] == c and j != i]  # never its own
                mu = sum(members) / len(members)
                logits.append(float(x[i] @ mu / mu.norm()) / 0.05)
            total = sum(math.exp(v) for v in logits)
            nats.append(-sum(math.exp(v) / total * math.log(math.exp(v) / total) for v in logits))
        assert shown["mean"] == pytest.approx(sum(nats) / 48, abs=1e-5)
        assert shown["share"] == pytest.approx(sum(nats) / 48 / math.log(12), abs=1e-5)
        assert shown["effective"] == pytest.approx(math.exp(sorted(nats)[23]), abs=1e-4)  # torch's lower median


def test_sampled_pairs_are_what_they_are_called():
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 4])
    pairs = closeups._pairs(labels, 0)
    assert pairs is not None
    same, different = pairs
    assert bool((labels[same[:, 0]] == labels[same[:, 1]]).all())
    assert bool((same[:, 0] != same[:, 1]).all())
    assert bool((labels[different[:, 0]] != labels[different[:, 1]]).all())
    assert set(map(tuple, same.tolist())) == {(0, 4), (0, 5), (4, 0), (4, 5), (5, 0), (5, 4), (1, 3), (3, 1)}
    counts = torch.bincount(same[:, 0] * 7 + same[:, 1])
    assert int(counts[counts > 0].min()) > 20_000 / 5 / 2 * 0.9  # each of the eight equally often, of five rows


def test_auroc_counts_pairs_and_half_of_ties():
    generator = torch.Generator().manual_seed(0)
    same = (torch.rand(40, generator=generator) * 10).round() / 10 + 0.2
    different = (torch.rand(50, generator=generator) * 10).round() / 10
    pairs = [(a, b) for a in same.tolist() for b in different.tolist()]
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert 0.6 < expected < 0.9
    assert closeups._auroc(same, different) == pytest.approx(expected, abs=1e-12)


def test_class_table(view: closeups.View):
    found = closeups.class_table(view, closeups.Album(nothing))
    assert found is not None
    labels = view.first.labels[view.pool]
    change = {
        f"kind {c}": float((view.sides[1].map_at_r - view.sides[0].map_at_r)[labels == c].double().mean())
        for c in range(12)
    }
    gains = [(r["tile"]["label"], pytest.approx(r["change"], abs=1e-6)) for r in found["gains"]]
    expected = sorted(((n, c) for n, c in change.items() if c > 1e-6), key=lambda nc: -nc[1])[:8]
    assert [c for _, c in expected] == [c for _, c in gains]
    assert {n for n, _ in gains} <= {n for n, c in change.items() if c > 1e-6}
    assert all(r["change"] < 0 and r["images"] == 4 for r in found["losses"])
    assert {c["key"]: c["count"] for c in found["counts"]} == {
        "better": sum(c > 1e-6 for c in change.values()),
        "unchanged": sum(abs(c) <= 1e-6 for c in change.values()),
        "worse": sum(c < -1e-6 for c in change.values()),
    }


def test_pool_is_bounded_and_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(closeups, "POOL", 10)
    (view,) = closeups.views({"all": embeddings()}, {}, 0)
    assert (len(view.pool), view.eligible) == (10, 48)
    assert view.pool.tolist() == sorted(set(view.pool.tolist()))
    text = Page(report(full_record(), nothing)).text
    assert "10 seeded queries out of 48" in text
    assert "from the sampled queries" in text


# ----------------------------------------------------------------------------------------------------------- training


def test_a_step_written_twice_counts_once_and_the_recipe_says_the_metric():
    history = [{"step": s, "loss": 1.0, "lr": 0.1} for s in (1, 2, 3)]
    history += [{"step": 2, "loss": float("nan"), "lr": 0.1}, {"step": 3, "val": {"map@r": 0.5, "recall@1": 0.2}}]
    record = Record({"training": {"best_step": 3}}, history, "monitor: recall@1\n")
    page = Page(report(record, nothing))
    assert "Validation Recall@1" in page.text
    assert "Validation MAP@R" not in page.text
    assert "nan" not in " ".join(page.values("path", "d"))
    assert len(Page(report(Record({}, history), nothing)).values("path", "d")) == 4  # raw and smooth loss, rate, check


# ------------------------------------------------------------------------------------------------------------- charts


def test_panel_keeps_points_inside_and_in_place():
    made = panel(
        "t",
        [Series([0.0, 5.0, 10.0], [1.0, float("inf"), 3.0], "after", filled=True)],
        x_range=(0.0, 10.0),
        y_range=(0.0, 4.0),
    )
    points = [tuple(map(float, p.split())) for p in made.curves[0].line.removeprefix("M").split("L")]
    assert len(points) == 2  # the infinite one is left out
    height = made.bottom - made.top
    assert points[0] == pytest.approx((made.left, made.bottom - height / 4), abs=0.06)
    assert points[1] == pytest.approx((made.right, made.bottom - height * 3 / 4), abs=0.06)
    assert made.curves[0].area.startswith(made.curves[0].line)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [], [1e-9, 1e-9 + 1e-25], [-3.0, 1e12]])
def test_panel_of_odd_values(values: list[float]):
    made = panel("t", [Series([float(i) for i in range(len(values))], values, "after")])
    assert all(made.top <= t.at <= made.bottom + 0.1 for t in made.y_ticks)
    assert all(math.isfinite(t.at) for t in made.x_ticks)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.37, 0.91), (1.0, 46_000.0), (3e-7, 8e-6), (99.0, 100.0)])
def test_ticks_are_inside_and_few(low: float, high: float):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= t <= high * (1 + 1e-9) for t in found)
    steps = {round((b - a) / (high - low), 6) for a, b in pairwise(found)}
    assert len(steps) == 1


def test_density_sums_to_one_even_outside_its_range():
    centres, shares = density(torch.tensor([-5.0, 0.1, 0.5, 7.0]), 0.0, 1.0, bins=10)
    assert sum(shares) == pytest.approx(1.0)
    assert centres[0] == pytest.approx(0.05)
    assert thin(centres, shares, 3)[0] == [centres[0], centres[4], centres[9]]


def test_wording():
    assert [as_number(v) for v in (0.0, 1.0, 0.9996, -0.0001, math.nan)] == [".000", "1.000", "1.000", ".000", "–"]
    assert [as_change(v) for v in (0.0004, 0.0006, -0.25)] == [".000", "+.001", "−.250"]
    assert [counted(n, "query") for n in (1, 1000)] == ["1 query", "1,000 queries"]


# ---------------------------------------------------------------------------------------------------------- real photos


def test_real_pictures(real_data: Path):
    paths = sorted((real_data / "emoji" / "images").glob("*/1F60*.png"))
    assert len(paths) >= 20
    names = sorted({p.stem for p in paths})
    small = [Image.open(p).convert("RGB").resize((12, 12)) for p in paths]
    pixels = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in small]).float()
    centred = pixels - pixels.mean(0)
    labels = torch.tensor([names.index(p.stem) for p in paths])
    ids = tuple(str(p.relative_to(real_data)) for p in paths)
    before, after = (
        Embeddings(torch.nn.functional.normalize(v, dim=1), labels, ids, tuple(names)) for v in (pixels, centred)
    )
    html = report(
        Record({"seed": 1}, before={"all": before}, after={"all": after}), lambda name: Image.open(real_data / name)
    )
    page = Page(html)
    pictures = [v for v in page.values("img", "src") if v.startswith("data:image/jpeg;base64,")]
    assert len(pictures) > 30
    for uri in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert max(image.size) <= 96
    assert len(html) < 3_000_000
