"""What tuning costs elsewhere: a probe measured before and after, and the weights between the two models.

    kept      = accuracy after / accuracy before        on images and names that the tuning has nothing to do with
    theta(w)  = (1 - w) theta_before + w theta_after    WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903

A sweep measures each w on the validation part, which says what tuning gained, and on the probe, which says what it
cost; the w with the largest sum of the two is taken. What was selected on is not reported: half of the probe's images
of each class are for the sweep, the other half for the report.

Letters: w weight of the tuned model, N images of the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from vicinal.data.manifest import Manifest
from vicinal.embedding import embed, embed_classes
from vicinal.evaluation.image_text import zero_shot_scores
from vicinal.evaluation.intervals import mean, over_seeds, paired_difference, paired_ratio
from vicinal.models.encoder import Encoder
from vicinal.models.merging import interpolate
from vicinal.types import InputError, Metrics, PerQuery

__all__ = ["WISE_FT_WEIGHTS", "Lost", "Probe", "Sweep", "sweep"]

WISE_FT_WEIGHTS = tuple(i / 10 for i in range(11))
PROBE = "probe/accuracy@0shot"


@dataclass(frozen=True, slots=True)
class Probe:
    """Images of other classes than those tuned on, to be recognised by name.

    Args:
        manifest: N images with labels.
        templates: sentences with {} in the place of the name; their vectors are averaged.
        settings: what `embed` and `embed_classes` take: device, precision.
        cache: where embeddings of images are kept, or None.

    Raises:
        InputError: fewer than two classes, or a row without a label.
    """

    manifest: Manifest
    templates: Sequence[str] = ("{}",)
    settings: dict[str, Any] = field(default_factory=dict)
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        if len(self.manifest.classes) < 2 or bool((self.manifest.labels() < 0).any()):
            raise InputError(
                f"probe: {len(self.manifest.classes)} classes among {len(self.manifest)} images; a probe needs images "
                "with labels, of two classes at least"
            )

    def halves(self) -> tuple[Bool[Tensor, "N"], Bool[Tensor, "N"]]:
        """Of each class every other image, by the order of its ids: to select on, and to report.

        A class of one image is reported.

        >>> rows = {"image": ["a.png", "b.png", "c.png", "d.png"], "label": ["cat", "cat", "cat", "dog"]}
        >>> [half.tolist() for half in Probe(Manifest.build(rows, ".")).halves()]
        [[False, True, False, False], [True, False, True, True]]
        """
        ids, labels = self.manifest.ids(), self.manifest.labels().tolist()
        seen: dict[int, int] = {}
        select = torch.zeros(len(ids), dtype=torch.bool)
        for row in sorted(range(len(ids)), key=lambda i: ids[i]):
            count = seen[labels[row]] = seen.get(labels[row], 0) + 1
            select[row] = count % 2 == 0
        return select, ~select

    def scores(self, encoder: Encoder, rows: Bool[Tensor, "N"] | None = None) -> PerQuery:
        """Whether each image is nearest to the name of its class, among the names of all of the probe's.

        Raises:
            InputError: the encoder reads no texts.
        """
        manifest = self.manifest if rows is None else self.manifest.where(rows)
        written = [name.replace("_", " ") for name in manifest.classes]
        names = embed_classes(encoder, written, self.templates, **self.settings)
        return zero_shot_scores(embed(encoder, manifest, cache=self.cache, **self.settings), names)


class Lost:
    """A probe asked before a tuning, and after each of several trainings of it.

    Args:
        probe: what to ask.
        before: the original.
        halved: only the half of its images that no weight was chosen on.
    """

    def __init__(self, probe: Probe, before: Encoder, *, halved: bool) -> None:
        self.probe = probe
        self.rows = probe.halves()[1] if halved else None
        self.before = probe.scores(before, self.rows)
        self.after: list[PerQuery] = []

    def ask(self, after: Encoder) -> None:
        """Ask one more tuned model."""
        self.after.append(self.probe.scores(after, self.rows))

    def scores(self) -> dict[str, list[PerQuery]]:
        """One value a query of either side; of several trainings a replicate each."""
        return {"before": [self.before], "after": [self.after[0] if len(self.after) == 1 else over_seeds(self.after)]}

    def metrics(self) -> dict[str, Metrics]:
        """The sides before, after, difference and kept (after / before), each metric -> Estimate."""
        before, after = (protocols[0] for protocols in self.scores().values())
        return {
            "before": mean(before),
            "after": mean(after),
            "difference": paired_difference(before, after),
            "kept": paired_ratio(before, after),
        }

    def __str__(self) -> str:
        one = {side: found["accuracy@0shot"] for side, found in self.metrics().items()}
        return (
            f"probe, accuracy@0shot: {one['before'].value:.3f} -> {one['after'].value:.3f}, "
            f"kept {one['kept'].value:.1%} [{one['kept'].low:.1%}, {one['kept'].high:.1%}], {one['after'].n} classes"
        )


@dataclass(frozen=True, slots=True)
class Sweep:
    """Models between two: what was taken, and the curve that says why.

    Args:
        encoder: the one taken, an ordinary encoder of the plain architecture.
        weight: w of it.
        curve: a mapping for each w: "weight", the metrics of validation, and of the probe where there is one.
    """

    encoder: Encoder
    weight: float
    curve: list[dict[str, float]]


def sweep(
    before: Encoder,
    after: Encoder,
    validate: Callable[[Encoder], Metrics],
    *,
    monitor: str,
    probe: Probe | None = None,
    rows: Bool[Tensor, "N"] | None = None,
    weights: Sequence[float] = WISE_FT_WEIGHTS,
) -> Sweep:
    """Measure the models between two, and take the best.

    Args:
        before: the original.
        after: the tuned model.
        validate: a model -> its metrics on the validation part.
        monitor: which of them counts.
        probe: what was known before; its accuracy counts as much as `monitor`. None: `monitor` alone counts.
        rows: of the probe's images those to select on.
        weights: w to try, from 0 (before) to 1 (after). Of equals the largest is taken.

    Raises:
        InputError: `monitor` is not among the metrics; the two are not of one architecture.
    """
    curve: list[dict[str, float]] = []
    for weight in weights:
        between = interpolate(before, after, weight)
        point = {"weight": weight} | {name: estimate.value for name, estimate in validate(between).items()}
        if monitor not in point:
            raise InputError(f"monitor: {monitor!r} is not measured on validation; there are {', '.join(point)}")
        if probe is not None:
            point[PROBE] = mean(probe.scores(between, rows))["accuracy@0shot"].value
        curve.append(point)
    best = max(curve, key=lambda point: (point[monitor] + point.get(PROBE, 0.0), point["weight"]))["weight"]
    return Sweep(interpolate(before, after, best), best, curve)
