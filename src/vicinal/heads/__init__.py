"""Few-shot heads: scikit-learn classifiers on vectors. See `head` for what they share, `selection` for the policies."""

from __future__ import annotations

import json
from pathlib import Path

from vicinal.heads.cache import APE, TipAdapter, TipAdapterF, TipX
from vicinal.heads.calibration import Curve, OpenSetThreshold, TemperatureScaling, curve
from vicinal.heads.head import Head
from vicinal.heads.linear import CLAP, GDA, LinearProbe, LPPlusPlus, ProKeR
from vicinal.heads.prototypes import NearestPrototype, ZeroShot
from vicinal.heads.selection import POLICIES, Selection, transferred
from vicinal.heads.support import Text, Validation, check_support
from vicinal.heads.whitening import Whitening
from vicinal.types import InputError

__all__ = [
    "APE",
    "CLAP",
    "GDA",
    "HEADS",
    "POLICIES",
    "Curve",
    "Head",
    "LPPlusPlus",
    "LinearProbe",
    "NearestPrototype",
    "OpenSetThreshold",
    "ProKeR",
    "Selection",
    "TemperatureScaling",
    "Text",
    "TipAdapter",
    "TipAdapterF",
    "TipX",
    "Validation",
    "Whitening",
    "ZeroShot",
    "check_support",
    "curve",
    "load_head",
    "transferred",
]

HEADS: dict[str, type[Head]] = {
    "zero_shot": ZeroShot,
    "nearest_prototype": NearestPrototype,
    "tip_adapter": TipAdapter,
    "tip_adapter_f": TipAdapterF,
    "tip_x": TipX,
    "ape": APE,
    "gda": GDA,
    "proker": ProKeR,
    "linear_probe": LinearProbe,
    "lp_plus_plus": LPPlusPlus,
    "clap": CLAP,
}
"""Heads by name. `text_use` and `adapted_use` of each say what it takes."""


def load_head(path: str | Path) -> Head:
    """Any head that `save` wrote.

    Raises:
        InputError: the file is missing, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            kind = json.loads((file.metadata() or {})["head"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is not a file of a head ({error}); write one with head.save") from error
    for head in HEADS.values():
        if head.__name__ == kind:
            return head.load(path)
    raise InputError(f"{path} holds a {kind!r}, which this version does not know; there are {', '.join(HEADS)}")
