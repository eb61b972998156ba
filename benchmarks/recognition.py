r"""Brands in whole scenes, end to end: a detector finds boxes, a model embeds them, references name them, or do not.

    python benchmarks/recognition.py $VICINAL_DATA --runs runs/logos/seed43 … --detector runs/detector/model \
        --division division.json --out runs/recognition

As `logos.py` does with given boxes: half of the brands are enrolled and the others are unknown, then the halves change
places. The model that the run began with and its tuned one each have a threshold of the best F1, fitted on the
calibration brands' given boxes, and each is looked at on the test brands' scenes twice: by the boxes of the truth, and
by those of the detector. Intervals hold both variances, of brands and of training seeds. A sheet of 24 test scenes, one
half of the brands enrolled, shows what that looks like.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from torch import Tensor

from vicinal.bring import starting_model
from vicinal.calibrate import enrolments, trials_of
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_table, read_voc
from vicinal.data.voc import base_brand
from vicinal.embedding import default_cache, embed
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.encoder import Encoder
from vicinal.recognise import Judged, Scenes, judge, measure, recognise
from vicinal.serving.detectors import Boxes, Detector, load_detector
from vicinal.serving.matching import Matcher
from vicinal.serving.objects import ObjectMatcher, open_encoder
from vicinal.types import Embeddings, Estimate

SETTINGS = {"fusion": "topk", "k": 3, "margin": 0.02}
SEED = 42


def of_pictures(manifest: Manifest, pictures: list[str]) -> Manifest:
    wanted = set(pictures)
    return manifest.where([p in wanted for p in manifest.column("image")]).compact()


class Remembering:
    """A detector that looks at each picture once, however often it is asked."""

    def __init__(self, detector: Detector) -> None:
        self.detector, self.seen = detector, dict[bytes, Boxes]()

    def __call__(self, pictures: Sequence[Tensor]) -> list[Boxes]:
        """The boxes of each picture."""
        marks = [hashlib.sha256(picture.contiguous().numpy()).digest() for picture in pictures]
        new = {mark: picture for mark, picture in zip(marks, pictures, strict=True) if mark not in self.seen}
        self.seen.update(zip(new, self.detector(list(new.values())) if new else [], strict=True))
        return [self.seen[mark] for mark in marks]


def embedded(encoder: Encoder, manifest: Manifest) -> Embeddings:
    return embed(encoder, manifest, cache=default_cache(), workers=0)


def benches(
    scenes: Manifest, references: Manifest, division: dict[str, dict[str, list[str]]], part: str
) -> tuple[Manifest, Manifest]:
    """Boxes and references of the brands of a part, with one list of classes."""
    asked, brands = of_pictures(scenes, division["pictures"][part]), set(division["brands"][part])
    labels = {*asked.column("label"), *references.column("label")}
    classes = tuple(sorted(label for label in labels if base_brand(label) in brands))
    mine = references.where([base_brand(label) in brands for label in references.column("label")])
    return asked.with_classes(classes), mine.with_classes(classes)


def fitted(encoder: Encoder, asked: Manifest, references: Manifest) -> OpenSetThreshold:
    """The threshold of the best F1 on given boxes, each half of the brands enrolled in turn."""
    mark = encoder.fingerprint()
    queries, gallery = embedded(encoder, asked), embedded(encoder, references)
    groups = {brand: base_brand(brand) for brand in asked.classes}
    trials, size = trials_of(gallery, queries, groups, fingerprint=mark, settings=SETTINGS, seed=SEED)
    settings = Matcher(gallery, fingerprint=mark, **SETTINGS).settings
    return OpenSetThreshold().fit(
        trials.scores,
        trials.right,
        fingerprint=mark,
        enrolled=trials.enrolled,
        settings=settings,
        gallery_size=size,
    )


def counts(judged: Judged) -> np.ndarray:
    """TP, FP, impostors accepted, objects with references, impostors: "U 5", by brand."""
    accepted, right, known = judged.accepted, judged.right, judged.enrolled
    columns = (accepted & right, accepted & ~right, accepted & ~known, known, ~known)
    size = len(judged.classes)
    return np.stack([np.bincount(judged.units, column, size) for column in columns], axis=1)


def rates(total: np.ndarray) -> dict[str, np.ndarray]:
    tp, fp, impostors, known, strangers = np.moveaxis(total, -1, 0)
    return {
        "precision": tp / np.maximum(tp + fp, 1),
        "recall": tp / known,
        "f1": 2 * tp / (tp + fp + known),
        "fpir": impostors / strangers,
    }


def over_seeds(start: Judged, tuned: list[Judged], resamples: int = 2000) -> dict[str, dict[str, Estimate]]:
    """Before, after and their difference; brands and training seeds are resampled, the same for both sides."""
    before, after = counts(start)[None], np.stack([counts(one) for one in tuned])
    rng = np.random.default_rng(0)
    seeds = rng.multinomial(len(tuned), np.full(len(tuned), 1 / len(tuned)), resamples) / len(tuned)
    brands = rng.multinomial(before.shape[1], np.full(before.shape[1], 1 / before.shape[1]), resamples)

    def drawn(table: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        return rates(np.einsum("rs,ru,suk->rk", weights, brands, table))

    sides = {
        "before": (rates(before.mean(0).sum(0)), drawn(before, np.ones((resamples, 1)))),
        "after": (rates(after.mean(0).sum(0)), drawn(after, seeds)),
    }
    pairs = zip(sides["after"], sides["before"], strict=True)
    value, many = ({name: one[name] - other[name] for name in one} for one, other in pairs)
    sides["difference"] = (value, many)
    n, queries = before.shape[1], len(start.accepted)
    found: dict[str, dict[str, Estimate]] = {}
    for side, (value, many) in sides.items():
        ends = {name: np.nanpercentile(drawn, (2.5, 97.5)).tolist() for name, drawn in many.items()}
        found[side] = {name: Estimate(float(value[name]), *ends[name], n, queries) for name in value}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", nargs="+", required=True, help="Of one recipe, a training seed each.")
    parser.add_argument("--detector", required=True)
    parser.add_argument("--division", type=Path, required=True)
    parser.add_argument("--detect-threshold", type=float, default=0.5)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--pad", type=float, default=0.08, help="Of all boxes, as the run was trained.")
    parser.add_argument("--part", default="test", help="calibration: to develop on.")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    division = json.loads(a.division.read_text())
    scenes = read_voc(a.data / "logo_scenes").with_padding(a.pad)
    references = read_table(a.data / "logo_scenes" / "references.csv")
    detector = Remembering(load_detector(a.detector, threshold=a.detect_threshold))
    calibration, measured = (benches(scenes, references, division, part) for part in ("calibration", a.part))
    truth = Scenes.of(measured[0], whole=True)
    judged: dict[str, list[Judged]] = {"given": [], "found": []}
    a.out.mkdir(parents=True, exist_ok=True)
    models = [starting_model(a.runs[0]), *(open_encoder(run) for run in a.runs)]
    for name, encoder in zip(["before", *a.runs], models, strict=True):
        mark = encoder.fingerprint()
        rule = fitted(encoder, *calibration)
        gallery = embedded(encoder, measured[1])
        halves = enrolments(gallery, {brand: base_brand(brand) for brand in gallery.classes}, SEED)
        for way in ("given", "found"):
            parts = []
            for half in halves:
                matcher = Matcher(gallery.where(half), fingerprint=mark, **SETTINGS).decide_by(rule)
                whole = ObjectMatcher(
                    detector, embedding_model=encoder, references=matcher, overlap=a.overlap, pad=a.pad
                )
                parts.append(judge(whole, truth, boxes=way))
                if way == "found" and name == a.runs[0] and len(parts) == 1:
                    print(recognise(whole, truth.drawn(24, SEED), a.out))
            judged[way].append(Judged.together(*parts))
            metrics = measure(judged[way][-1])
            print(f"{name}, boxes {way}, t = {rule.threshold_:.3f}: f1 {metrics['f1']}", flush=True)
    boxes = {name: metrics[name] for name in ("box_recall", "box_precision")}
    tables = {way: over_seeds(some[0], some[1:]) for way, some in judged.items()}
    print(f"{sum(map(len, truth.boxes))} objects of {len(judged['given'][0].classes)} brands in {len(truth)} pictures")
    for name, one in boxes.items():
        print(f"{name} {one}")
    for way, sides in tables.items():
        for name in sides["before"]:
            print(f"boxes {way:5} {name:9} " + "   ".join(f"{side} {one[name]}" for side, one in sides.items()))
    content = {way: {s: {n: asdict(e) for n, e in one.items()} for s, one in t.items()} for way, t in tables.items()}
    content["boxes"] = {name: asdict(one) for name, one in boxes.items()}
    (a.out / f"{a.part}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
