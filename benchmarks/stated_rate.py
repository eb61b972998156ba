"""Is a stated rate of false accepts kept? Fitted on some classes again and again, and looked at on all the others.

    python benchmarks/stated_rate.py $VICINAL_DATA --runs runs/logos/seed43 … --out runs/stated_rate

1.  Two sets with a thousand classes that the model was not trained on: marks of brands (`brand_logos`, less the test
    brands of `logos.py`) by the untuned model, and emoji by the untuned and the tuned one. Each time, so many classes
    are drawn, a threshold is fitted on them as `vicinal calibrate` does, and its true rate is that of all queries of
    all classes, exactly averaged over all galleries of as many classes:

        a query accepts class i of M others if s_i >= t, and no class above s_i - margin is in the gallery but i;
        of all galleries of N, that are C(M - j, N - 1) / C(M, N), with j the classes above s_i - margin, i among them

2.  The calibration brands of `logos.py` alone, divided in two by brand: fitted on one half, measured on the other,
    whose few brands make the measured rate itself uncertain.

For the quantile of the strangers (confidence None), and for a confidence of .95: how often the stated rate is exceeded,
the mean rate, and how often the data were too few to state it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from scipy.special import gammaln

from logos import SETTINGS, benches, division
from vicinal.bring import starting_model
from vicinal.calibrate import Bench, trials_of
from vicinal.data.sources import read_table, read_voc
from vicinal.data.voc import base_brand
from vicinal.embedding import default_cache, embed
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.serving.matching import Matcher
from vicinal.types import Embeddings, InputError

CONFIDENCES = (None, 0.8, 0.95)
GRID = np.linspace(0, 1, 2001)
Vectors = tuple[Embeddings, Embeddings, dict[str, str]]  # references, queries, class -> what it is a variant of


def vectors(encoder: Encoder, bench: Bench) -> Vectors:
    given, asked = (embed(encoder, side, cache=default_cache()) for side in (bench.references, bench.queries))
    return given, asked, bench.groups()


def of_classes(found: Vectors, classes: np.ndarray) -> Vectors:
    wanted = torch.from_numpy(classes)
    given, asked, groups = found
    return given.where(torch.isin(given.labels, wanted)), asked.where(torch.isin(asked.labels, wanted)), groups


def shown(found: Vectors) -> np.ndarray:
    """The classes with references and queries."""
    return np.intersect1d(found[0].labels.numpy(), found[1].labels.numpy())


def true_rates(found: Vectors, enrolled: int) -> np.ndarray:
    """FPIR at each threshold of GRID, over all queries and all galleries of `enrolled` other classes."""
    given, asked, groups = found
    scores, present = Matcher(given, fingerprint="", **SETTINGS).scores(asked.vectors, fingerprint="")
    of = np.array([groups[given.classes[i]] for i in present.tolist()])
    mine = np.array([groups[asked.classes[i]] for i in asked.labels.tolist()])
    total = np.zeros(len(GRID))
    for row, own in zip(scores.numpy(), mine, strict=True):
        s = np.sort(row[of != own])[::-1].astype(float)
        m, n = len(s), enrolled
        above = np.searchsorted(-s, -(s - SETTINGS["margin"]), side="left")
        left = m - above
        ways = gammaln(left + 1) - gammaln(n) - gammaln(np.maximum(left - n + 2, 1))
        share = np.where(left >= n - 1, np.exp(ways - gammaln(m + 1) + gammaln(n + 1) + gammaln(m - n + 1)), 0.0)
        total += np.append(0, share.cumsum())[np.searchsorted(-s, -GRID, side="right")]
    return total / len(scores)


def fitted(found: Vectors, rate: float, seed: int) -> dict[float | None, float | None]:
    """Confidence -> threshold, None where the data are too few to state it."""
    trials, _ = trials_of(*found, fingerprint="", settings=SETTINGS, seed=seed)
    limits: dict[float | None, float | None] = {}
    for confidence in CONFIDENCES:
        rule = OpenSetThreshold(rate=rate, confidence=confidence)
        try:
            limits[confidence] = rule.fit(
                trials.scores, trials.right, enrolled=trials.enrolled, units=trials.units, fingerprint=""
            ).threshold_
        except InputError:
            limits[confidence] = None
    return limits


def told(title: str, limits: list[dict[float | None, float | None]], rates: list, rate: float) -> dict[str, object]:
    """How often each exceeded the stated rate; `rates` gives the true one of a threshold, one function a draw."""
    content: dict[str, object] = {"draws": len(limits), "rate": rate}
    print(title)
    for confidence in CONFIDENCES:
        found = [f(one[confidence]) for one, f in zip(limits, rates, strict=True) if one[confidence] is not None]
        refused = len(limits) - len(found)
        of = {"refused": refused}
        if found:
            of |= {"exceeded": float(np.mean(np.array(found) > rate + 1e-12)), "mean": float(np.mean(found))}
            of |= {"95th percentile": float(np.percentile(found, 95))}
        content[str(confidence)] = of
        print(f"  confidence {confidence}: " + ", ".join(f"{k} {v:.3f}" for k, v in of.items()))
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="of logos.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    untuned, tuned = starting_model(given.runs[0]), {run.name: load_encoder(run) for run in given.runs}
    held = set(division(read_voc(given.data / "logo_scenes"))["test"]["brands"])
    marks = read_table(given.data / "brand_logos" / "table.csv").rebased(given.data)
    marks = marks.where([base_brand(label) not in held for label in marks.column("label")]).compact()
    emoji = read_table(given.data / "emoji" / "table.csv").rebased(given.data)
    first = next(iter(tuned.values()))
    content: dict[str, object] = {}
    sets = {"brands, untuned": (marks, untuned), "emoji, untuned": (emoji, untuned), "emoji, tuned": (emoji, first)}
    for name, (manifest, encoder) in sets.items():
        found = vectors(encoder, Bench.drawn(manifest, 2, 42))
        classes = shown(found)
        found = of_classes(found, classes)
        for many, rate in ((60, 0.1), (60, 0.05), (100, 0.05), (300, 0.05), (400, 0.02)):
            rates = true_rates(found, many // 2)
            rng = np.random.default_rng(0)
            limits = [
                fitted(of_classes(found, np.sort(rng.permutation(classes)[:many])), rate, draw)
                for draw in range(given.draws)
            ]
            title = f"{name}: {many} of {len(classes)} classes, rate {rate}"
            content[title] = told(title, limits, [lambda t, r=rates: np.interp(t, GRID, r)] * given.draws, rate)
    for name, sides in benches(given.data, given.out).items():
        for run, encoder in {"untuned": untuned, **tuned}.items():
            found = vectors(encoder, sides["val"])
            classes, rng = shown(found), np.random.default_rng(0)
            limits, rates_of = [], []
            for draw in range(given.draws):
                order = rng.permutation(classes)
                one, other = (of_classes(found, np.sort(half)) for half in np.array_split(order, 2))
                trials, _ = trials_of(*other, fingerprint="", settings=SETTINGS, seed=draw)
                strangers = trials.scores[~trials.enrolled]
                limits.append(fitted(one, 0.1, draw))
                rates_of.append(lambda t, s=strangers: float((s >= t).double().mean()))
            title = f"{name}, {run}: half of {len(classes)} calibration classes, the other half measured, rate 0.1"
            content[title] = told(title, limits, rates_of, 0.1)
    (given.out / "stated_rate.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
