"""Losses on embeddings: of labelled items, and of images with texts.

    loss(embeddings: "B D", labels: "B", *, groups=None) -> ""
    loss(image: "B D", text: "B D", *, ids=None) -> ""

The table a loss stands in says what it is built with. One of PROXY_LOSSES has a weight for each class and is built as
`Loss(dim, classes, **settings)`; one of PAIR_LOSSES compares the items of a batch and is built as `Loss(**settings)`
(`WeightedSum` adds up several); one of LINEAR_LOSSES is built as those with a weight are, but starts at random, since
lengths count in it; one of CONTRASTIVE_LOSSES compares images with texts and starts from the encoder's own scale (and
bias). DINO stands in no table: it compares views, `loss(student: "S B K", teacher: "T B K") -> ""`, without labels.
"""

from __future__ import annotations

from vicinal.losses.contrastive import InfoNCE, SigLIP
from vicinal.losses.distillation import DINO, Retention
from vicinal.losses.linear import CrossEntropy
from vicinal.losses.margin import ArcFace, CosFace, EasyArcFace, SubCenterArcFace, start_from_class_means
from vicinal.losses.pair import CrossBatchMemory, MultiSimilarity, NTXent, SupCon, Triplet, WeightedSum
from vicinal.losses.proxy import ProxyAnchor, ProxyNCA

__all__ = [
    "CONTRASTIVE_LOSSES",
    "DINO",
    "LINEAR_LOSSES",
    "PAIR_LOSSES",
    "PROXY_LOSSES",
    "ArcFace",
    "CosFace",
    "CrossBatchMemory",
    "CrossEntropy",
    "EasyArcFace",
    "InfoNCE",
    "MultiSimilarity",
    "NTXent",
    "ProxyAnchor",
    "ProxyNCA",
    "Retention",
    "SigLIP",
    "SubCenterArcFace",
    "SupCon",
    "Triplet",
    "WeightedSum",
    "start_from_class_means",
]

PROXY_LOSSES: dict[str, type[ArcFace | EasyArcFace | SubCenterArcFace | CosFace | ProxyAnchor | ProxyNCA]] = {
    "arcface": ArcFace,
    "easy_arcface": EasyArcFace,
    "subcenter_arcface": SubCenterArcFace,
    "cosface": CosFace,
    "proxy_anchor": ProxyAnchor,
    "proxy_nca": ProxyNCA,
}
LINEAR_LOSSES: dict[str, type[CrossEntropy]] = {"cross_entropy": CrossEntropy}
PAIR_LOSSES: dict[str, type[NTXent | SupCon | Triplet | MultiSimilarity]] = {
    "ntxent": NTXent,
    "supcon": SupCon,
    "triplet": Triplet,
    "multi_similarity": MultiSimilarity,
}
CONTRASTIVE_LOSSES: dict[str, type[InfoNCE | SigLIP]] = {"infonce": InfoNCE, "siglip": SigLIP}
