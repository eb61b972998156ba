r"""Image-text tuning on small real data: tables, a base model, and what tuning it to a new domain gains and costs.

    python benchmarks/image_text.py tables --data DATA --out TABLES     # four data sets -> images and captions
    vicinal train recipes/lit.yaml data.table=TABLES/base.parquet data.root=DATA out=BASE \
        model=timm:vit_tiny_patch16_224@WEIGHTS preprocess.size=112
    python benchmarks/image_text.py study --tables TABLES --data DATA --base BASE --out RUNS [CELL ...]
    python benchmarks/image_text.py show --out RUNS

DATA holds the folders `emoji`, `brand_logos`, `grocery` and `clothing`, each with a `table.csv`.

**Who sees what.** The name of an item, hashed, says whether the base model is trained on it (half of all), selected on
it (a tenth), or never sees it (the rest, "reserved"). Beside that it sees no picture in the emoji style `fx`, no test
picture of a grocery, and no garment at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from vicinal.recipe import Recipe, apply_override
from vicinal.run import run

Row = dict[str, Any]


def bucket(name: str, salt: str) -> int:
    """0 to 99, the same on every machine."""
    return int(hashlib.sha256(f"{salt}/{name.casefold()}".encode()).hexdigest(), 16) % 100


def base_part(name: str) -> str:
    """Which part of the base model's data an item is in."""
    place = bucket(name, "base")
    return "train" if place < 50 else "val" if place < 60 else "reserved"


def read(data: Path, name: str) -> list[Row]:
    rows = pa.csv.read_csv(
        data / name / "table.csv",
        convert_options=pa.csv.ConvertOptions(column_types={"label": pa.string(), "title": pa.string()}),
    ).to_pylist()
    return [row | {"image": f"{name}/{row['image']}", "data": name} for row in rows]


def emoji(data: Path) -> list[Row]:
    """An item is a name; its captions are that name and the keywords, each of which several items may share."""
    return [
        row
        | {"label": row["caption"], "text": row["caption"], "captions": [row["caption"], *row["keywords"].split("|")]}
        for row in read(data, "emoji")
    ]


def brands(data: Path) -> list[Row]:
    """An item is a brand; its captions are the titles that the collections give it, the commonest first."""
    rows = read(data, "brand_logos")
    titles: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        titles[row["label"]][row["title"]] += 1
    ranked = {label: sorted(of, key=lambda t, of=of: (-of[t], len(t), t)) for label, of in titles.items()}
    return [
        row | {"label": ranked[row["label"]][0], "text": ranked[row["label"]][0], "captions": ranked[row["label"]]}
        for row in rows
    ]


def grocery(data: Path, *, described: bool) -> list[Row]:
    """An item is a product: its name, what is written of it, and each sentence of that."""
    rows = []
    for row in read(data, "grocery"):
        name, text = row["label"].replace("-", " "), row["description"]
        sentences = [part.strip(" .") + "." for part in text.split(". ") if len(part) > 10]
        captions = [text, name, *sentences] if described else [name, text, *sentences]
        rows.append(row | {"label": name, "text": captions[0], "captions": list(dict.fromkeys(captions))})
    return rows


def clothing(data: Path) -> list[Row]:
    """An item is a caption, such as "kids dress"; the photographers are apart."""
    rows = []
    for row in read(data, "clothing"):
        kind = row["caption"]
        said = [kind, f"a photo of a {kind}", f"{kind} on the floor", f"a {kind.removeprefix('kids ')}, clothing"]
        rows.append(row | {"label": kind, "text": kind, "captions": said, "group": f"sender {row['sender']}"})
    return rows


def base(data: Path) -> Iterable[Row]:
    """What the base model is trained, selected and measured on."""
    for row in (*emoji(data), *brands(data), *grocery(data, described=False)):
        part = base_part(row["label"])
        if row["data"] == "emoji" and row["style"] == "fx":
            continue
        if row["data"] == "grocery" and row["split"] != ("test" if part == "reserved" else "train"):
            continue
        yield row | {"split": "test" if part == "reserved" else part}


def emoji_fx(data: Path) -> Iterable[Row]:
    """The unseen style. Measured and selected on names that the base model has not seen either."""
    for row in emoji(data):
        if row["style"] == "fx":
            yield row | {"split": within_reserved(row["label"])}


def brand_titles(data: Path) -> Iterable[Row]:
    """Marks and titles, measured and selected on brands that the base model has not seen."""
    for row in brands(data):
        yield row | {"split": within_reserved(row["label"])}


def within_reserved(name: str) -> str:
    """Of the reserved items a sixth to train on too, a third to select on, a half to measure."""
    if base_part(name) != "reserved":
        return "train"
    place = bucket(name, "study")
    return "train" if place < 17 else "val" if place < 50 else "test"


def grocery_texts(data: Path) -> Iterable[Row]:
    """The official division; the caption that counts is the product's text."""
    yield from grocery(data, described=True)


def clothing_sender(data: Path) -> Iterable[Row]:
    """Photographers apart: six tenths to train, one to select, three to measure."""
    for row in clothing(data):
        place = bucket(row["group"], "study")
        yield row | {"split": "train" if place < 60 else "val" if place < 70 else "test"}


def known(data: Path, name: str) -> Iterable[Row]:
    """What the base model learnt by heart, to see what tuning makes it forget: some of its training pictures."""
    for row in base(data):
        if row["split"] == "train" and row["data"] == name and bucket(row["image"], "probe") < PROBED[name]:
            yield row | {"split": "test"}


PROBED = {"emoji": 22, "brand_logos": 15}
"""Per cent of the training pictures."""

KEPT = {"brand_titles": (40, 60), "grocery_texts": (40, 25), "clothing_sender": (40, 40)}
"""Per cent of the pictures of a table that are trained on, and that are measured: what a few dozen steps can see."""


def thinned(name: str, rows: Iterable[Row]) -> list[Row]:
    """By a hash of the picture. The study selects nothing, so its validation rows stay away."""
    train, test = KEPT.get(name, (100, 100))
    share = {"train": train, "test": test, "val": 0}
    return [row for row in rows if bucket(row["image"], "thin") < share[row["split"]]]


TABLES = {
    "base": base,
    "emoji_fx": emoji_fx,
    "brand_titles": brand_titles,
    "grocery_texts": grocery_texts,
    "clothing_sender": clothing_sender,
    "known_emoji": lambda data: known(data, "emoji"),
    "known_brands": lambda data: known(data, "brand_logos"),
}
STUDIED = ("emoji_fx", "grocery_texts", "brand_titles", "clothing_sender")


def of_study(name: str, data: Path) -> list[Row]:
    return thinned(name, TABLES[name](data))


COLUMNS = ("image", "label", "text", "captions", "split", "data")


def write_tables(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (TABLES | {f"{name}_study": partial(of_study, name) for name in STUDIED}).items():
        kept = [{column: row[column] for column in COLUMNS} for row in rows(data)]
        pa.parquet.write_table(pa.Table.from_pylist(kept), out / f"{name}.parquet")
        parts = Counter(row["split"] for row in kept)
        items = {part: len({row["label"] for row in kept if row["split"] == part}) for part in parts}
        print(f"{name}: " + ", ".join(f"{part} {parts[part]:,} images of {items[part]:,} items" for part in parts))


LOSSES = ("infonce", "siglip")
DRAWN = {"any": "a caption drawn at each look", "first": "one caption"}


def cells() -> dict[str, dict[str, Any]]:
    """Name -> what differs, the headline first; brands and garments have no captions that say more than their name."""
    found = {}
    for towers in ("both", "text"):
        for trained in ("any", "first"):
            for loss in LOSSES:
                for name in STUDIED:
                    if trained == "any" or name in ("emoji_fx", "grocery_texts"):
                        cell = {"table": name, "loss": loss, "trained": trained, "towers": towers}
                        found[f"{name}-{loss}-{trained}-{towers}"] = cell
    return found


def recipe(cell: dict[str, Any], tables: Path, data: Path, model: str, seeds: int, changes: list[str]) -> Recipe:
    """The recipe of a cell, at 112 px: the whole text tower, alone or with low ranks of the image tower; few steps."""
    probe = "known_brands" if cell["table"] == "emoji_fx" else "known_emoji"
    views = "logo" if cell["table"] in ("emoji_fx", "brand_titles") else "light"
    content: dict[str, Any] = {
        "data": {"table": str(tables / f"{cell['table']}_study.parquet"), "root": str(data), "leaks": "drop"},
        "split": {"official": {"val": 0}},
        "model": model,
        "adapt": [{"full": {"tower": "text"}}, *([{"lora": {"rank": 8}}] if cell["towers"] == "both" else [])],
        "loss": {cell["loss"]: {}},
        "captions": {"trained": cell["trained"]},
        "sampler": {"shuffle": {"batch_size": 64}},
        "augment": views if cell["towers"] == "both" else "none",
        "lr": 1e-3,
        "steps": 30 if cell["towers"] == "both" else 60,
        "probe": {"data": {"table": str(tables / f"{probe}.parquet"), "root": str(data)}},
        "shots": [1],
        "draws": 2,
        "seeds": seeds,
        "workers": 0,
        "trackers": [],
    }
    for change in changes:
        apply_override(content, change)
    return Recipe.parse(content)


def study(given: argparse.Namespace) -> None:
    chosen = given.cells or list(cells())
    for name in chosen:
        out = given.out / name
        if (out / "results.json").exists():
            continue
        made = recipe(cells()[name], given.tables, given.data, str(given.base), given.seeds, given.change)
        run(made, out, resume="last" if out.exists() else None)


def show(out: Path) -> None:
    """One line for each cell, part and metric: before, after, difference, with intervals over items and seeds."""
    metrics = ["accuracy@0shot"] + [f"full/{way}_recall@{k}" for way in WAYS for k in (1, 5, 10)]
    metrics += [f"full/{way}_{name}" for way in WAYS for name in ("mrr", "median_rank")]
    for path in sorted(out.glob("*/results.json")):
        results = json.loads(path.read_text())
        print(f"\n{path.parent.name}, seeds {[row['seed'] for row in results.get('seeds', [])] or results['seed']}")
        for part, measured in results["after"].items():
            for metric in metrics:
                before, after = results["before"][part].get(metric), measured.get(metric)
                change = results["difference"][part].get(metric)
                if after is None:
                    continue
                relative = f" {after['value'] / before['value'] - 1:+.0%}" if before["value"] else ""
                print(f"  {part} {metric}: {said(before)} -> {said(after)}, {said(change)}{relative}, n={after['n']}")
        if "probe" in results:
            one = {side: found["accuracy@0shot"] for side, found in results["probe"].items()}
            print(f"  probe: {said(one['before'])} -> {said(one['after'])}, kept {said(one['kept'])}")


WAYS = ("image_to_text", "text_to_image")


def said(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    ends = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    tables = verbs.add_parser("tables")
    studied = verbs.add_parser("study")
    studied.add_argument("cells", nargs="*", help=", ".join(cells()))
    studied.add_argument("--tables", type=Path, required=True)
    studied.add_argument("--base", type=Path, required=True)
    studied.add_argument("--seeds", type=int, default=3)
    studied.add_argument("--change", action="append", default=[], help="KEY=VALUE of the recipe")
    for verb in (tables, studied):
        verb.add_argument("--data", type=Path, required=True)
    shown = verbs.add_parser("show")
    for verb in (tables, studied, shown):
        verb.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    match given.verb:
        case "tables":
            write_tables(given.data, given.out)
        case "study":
            study(given)
        case _:
            show(given.out)


if __name__ == "__main__":
    main()
