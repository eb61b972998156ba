"""How the report says numbers and names: shares without their zero, differences with their sign, nouns with a count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

__all__ = ["PARTS", "as_change", "as_number", "as_text", "counted", "known", "metric_name", "part_order"]

PARTS = ("unseen", "seen", "joint", "all")
METRIC_NAMES = {"map@r": "MAP@R", "map@r_legacy": "MAP@R, legacy", "r_precision": "R-precision", "mrr": "MRR"}
METRIC_NAMES |= {"median_rank": "Median rank", "recall_ceiling@1": "Ceiling of Recall@1"}
WAYS = {"image_to_text_": "Image to text", "text_to_image_": "Text to image"}


def part_order(name: str) -> tuple[int, str]:
    """A sort key: the most telling part first, parts of other names after them in alphabetical order."""
    return (PARTS.index(name) if name in PARTS else len(PARTS), name)


def known(value: object) -> TypeGuard[float]:
    """Whether a value of the record is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def as_number(value: float | int | None, digits: int = 3) -> str:
    """A share of one without its zero: .514; an unknown is a dash.

    >>> as_number(0.51449), as_number(1.0), as_number(-0.02), as_number(None)
    ('.514', '1.000', '−.020', '–')
    """
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{abs(value):.{digits}f}"
    sign = "\N{MINUS SIGN}" if value < 0 and float(text) > 0 else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def as_change(value: float | int | None, digits: int = 3) -> str:
    """A difference, with its sign: +.282.

    >>> as_change(0.282), as_change(-0.1), as_change(0.0), as_change(None)
    ('+.282', '−.100', '.000', '–')
    """
    text = as_number(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and float(f"{value:.{digits}f}") > 0 else text


def as_text(value: object) -> str:
    """Any value of the record, for reading."""
    match value:
        case None:
            return "\N{EN DASH}"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case float():
            return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
        case list() | tuple() if all(not isinstance(v, (list, tuple, dict)) for v in value):
            return (
                " \N{MULTIPLICATION SIGN} ".join(map(as_text, value))
                if _is_size(value)
                else ", ".join(map(as_text, value))
            )
        case _:
            return str(value)


def _is_size(value: Sequence[object]) -> bool:
    return len(value) == 2 and all(isinstance(v, int) for v in value)


def metric_name(name: str) -> str:
    """A metric's name, for reading.

    >>> metric_name("map@r"), metric_name("recall@5"), metric_name("accuracy@1shot"), metric_name("f1")
    ('MAP@R', 'Recall@5', '1-shot accuracy', 'f1')
    >>> metric_name("full/text_to_image_recall@10"), metric_name("accuracy@0shot")
    ('Text to image Recall@10, full', 'Zero-shot accuracy')
    """
    if "/" in name:
        protocol, _, rest = name.partition("/")
        way = next((way for way in WAYS if rest.startswith(way)), "")
        return f"{WAYS.get(way, '')} {metric_name(rest.removeprefix(way))}, {protocol}".strip()
    kind, _, detail = name.partition("@")
    if name == "accuracy@0shot":
        return "Zero-shot accuracy"
    if kind == "accuracy" and detail.endswith("shot"):
        return f"{detail.removesuffix('shot')}-shot accuracy"
    return METRIC_NAMES.get(name) or (f"Recall@{detail}" if kind == "recall" and detail else name)


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "class"), counted(1446, "class"), counted(2, "query")
    ('1 class', '1,446 classes', '2 queries')
    """
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
