"""The tables that docs/overlap.md measures on: a part of each data set, so that every model embeds it in a minute.

    python benchmarks/overlap_tables.py DATA OUT

DATA holds the folders grocery, clothing, vehicle_logos and emoji, each with a table.csv; OUT gets a CSV of each, with
absolute paths and without the column `split`. Drawn with one random.Random(0), in this order.
"""

from __future__ import annotations

import collections
import csv
import random
import sys
from pathlib import Path

PARTS = {  # images a class at most, classes at most, images a class at least
    "grocery": (24, None, 2),
    "clothing": (80, None, 2),
    "vehicle_logos": (99, None, 2),
    "emoji": (3, 400, 3),
}


def main(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for name, (images, classes, least) in PARTS.items():
        with (data / name / "table.csv").open() as file:
            rows = list(csv.DictReader(file))
        by_class = collections.defaultdict(list)
        for row in rows:
            by_class[row["label"]].append(row)
        chosen = sorted(label for label, own in by_class.items() if len(own) >= least)
        rng.shuffle(chosen)
        kept = []
        for label in sorted(chosen[:classes]):
            rng.shuffle(by_class[label])
            kept += by_class[label][:images]
        for row in kept:
            row["image"] = str((data / name / row["image"]).absolute())
        with (out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [c for c in kept[0] if c != "split"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        print(f"{name}: {len(kept)} images of {len(chosen[:classes])} classes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
