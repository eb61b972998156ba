"""Losses on embeddings and labels: `loss(embeddings: "B D", labels: "B", *, groups=None) -> ""`.

The table a loss stands in says what it is built with. One of PROXY_LOSSES has a weight for each class and is built as
`Loss(dim, classes, **settings)`; one of PAIR_LOSSES compares the items of a batch and is built as `Loss(**settings)`.
"""

from __future__ import annotations

from torch import nn

from vicinal.losses.distillation import Retention
from vicinal.losses.margin import ArcFace, CosFace, EasyArcFace, SubCenterArcFace, start_from_class_means
from vicinal.losses.pair import NTXent, SupCon, Triplet

__all__ = [
    "PAIR_LOSSES",
    "PROXY_LOSSES",
    "ArcFace",
    "CosFace",
    "EasyArcFace",
    "NTXent",
    "Retention",
    "SubCenterArcFace",
    "SupCon",
    "Triplet",
    "start_from_class_means",
]

PROXY_LOSSES: dict[str, type[ArcFace | EasyArcFace | SubCenterArcFace | CosFace]] = {
    "arcface": ArcFace,
    "easy_arcface": EasyArcFace,
    "subcenter_arcface": SubCenterArcFace,
    "cosface": CosFace,
}
PAIR_LOSSES: dict[str, type[nn.Module]] = {"ntxent": NTXent, "supcon": SupCon, "triplet": Triplet}
