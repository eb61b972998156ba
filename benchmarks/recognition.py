r"""Brands in whole scenes, end to end: a detector finds boxes, a model embeds them, references name them, or do not.

    python benchmarks/recognition.py $VICINAL_DATA --run runs/logos/seed42 --detector runs/detector/model \
        --division division.json --out runs/recognition

As `logos.py` does with given boxes: half of the brands are enrolled and the others are unknown, then the halves change
places. The model that the run began with and its tuned one each have a threshold of the best F1, fitted on the
calibration brands' given boxes, and each is looked at on the test brands' scenes twice: by the boxes of the truth, and
by those of the detector. A sheet of the first test scenes, with every test brand enrolled, shows what that looks like.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from torch import Tensor

from vicinal.calibrate import enrolments, trials_of
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_table, read_voc
from vicinal.data.voc import base_brand
from vicinal.embedding import default_cache, embed
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.encoder import Encoder
from vicinal.recognise import Judged, Scenes, compare, judge, measure, open_models, recognise
from vicinal.serving.detectors import Boxes, Detector, load_detector
from vicinal.serving.matching import Matcher
from vicinal.serving.objects import ObjectMatcher
from vicinal.types import Embeddings, Metrics

SETTINGS = {"fusion": "topk", "k": 3, "margin": 0.02}
SEED = 42


def of_pictures(manifest: Manifest, pictures: list[str]) -> Manifest:
    wanted = set(pictures)
    return manifest.where([p in wanted for p in manifest.column("image")]).compact()


def of_brands(manifest: Manifest, brands: list[str], classes: tuple[str, ...]) -> Manifest:
    wanted = set(brands)
    return manifest.where([base_brand(b) in wanted for b in manifest.column("label")]).with_classes(classes)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", required=True)
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
    all_references = read_table(a.data / "logo_scenes" / "references.csv")
    detector = Remembering(load_detector(a.detector, threshold=a.detect_threshold))
    judged: dict[tuple[str, str], Judged] = {}
    results: dict[str, dict[str, object]] = {}
    for name, encoder in open_models([a.run], baseline=True).items():
        mark = encoder.fingerprint()
        sides = {}
        for part in ("calibration", a.part):
            asked = of_pictures(scenes, division["pictures"][part])
            brands = division["brands"][part]
            given = [manifest.column("label") for manifest in (asked, all_references)]
            classes = tuple(sorted({b for labels in given for b in labels if base_brand(b) in set(brands)}))
            sides[part] = asked.with_classes(classes), of_brands(all_references, brands, classes)
        asked, references = (embedded(encoder, one) for one in sides["calibration"])
        groups = {brand: base_brand(brand) for brand in asked.classes}
        trials, gallery = trials_of(references, asked, groups, fingerprint=mark, settings=SETTINGS, seed=SEED)
        settings = Matcher(references, fingerprint=mark, **SETTINGS).settings
        rule = OpenSetThreshold().fit(
            trials.scores,
            trials.right,
            fingerprint=mark,
            enrolled=trials.enrolled,
            settings=settings,
            gallery_size=gallery,
        )
        truth = Scenes.of(sides[a.part][0], whole=True)
        references = embedded(encoder, sides[a.part][1])
        groups = {brand: base_brand(brand) for brand in references.classes}
        ways: tuple[Literal["given", "found"], ...] = ("given", "found")
        for way in ways:
            halves = []
            for half in enrolments(references, groups, SEED):
                matcher = Matcher(references.where(half), fingerprint=mark, **SETTINGS).decide_by(rule)
                whole = ObjectMatcher(
                    detector, embedding_model=encoder, references=matcher, overlap=a.overlap, pad=a.pad
                )
                halves.append(judge(whole, truth, boxes=way))
            judged[name, way] = Judged.together(*halves)
            tell(f"{name}, boxes {way}, t = {rule.threshold_:.3f}", measure(judged[name, way]), results)
    start, tuned = dict.fromkeys(name for name, _ in judged)
    for way in ways:
        tell(f"difference, boxes {way}", compare(judged[start, way], judged[tuned, way]), results)
    everyone = Matcher(references, fingerprint=mark, **SETTINGS).decide_by(rule)
    whole = ObjectMatcher(detector, embedding_model=encoder, references=everyone, overlap=a.overlap, pad=a.pad)
    a.out.mkdir(parents=True, exist_ok=True)
    print(recognise(whole, truth.drawn(24, SEED), a.out))
    (a.out / f"{a.part}.json").write_text(json.dumps(results, indent=1))


def tell(what: str, metrics: Metrics, results: dict[str, dict[str, object]]) -> None:
    print(what, flush=True)
    for name, estimate in metrics.items():
        print(f"  {name:14} {estimate}   {estimate.n} brands, {estimate.queries:,} answers", flush=True)
    results[what] = {name: asdict(estimate) for name, estimate in metrics.items()}


if __name__ == "__main__":
    main()
