"""A manifest divided for a run: what is trained on, selected on, and measured on, as masks over its rows.

The parts that are measured are `seen` (classes that were trained on, images that were not), `unseen` (classes that
were not), `joint` (both, scored among all classes) or, where every class is trained on, or which are is not known,
`all`. Where everything is trained on there are none, and what is measured is other data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vicinal.data.manifest import Manifest
from vicinal.data.splits import class_disjoint, grouped, holdout_images, official
from vicinal.types import InputError

__all__ = ["Division", "Part", "divide"]


@dataclass(frozen=True, slots=True)
class Part:
    """What one measurement looks at.

    Args:
        queries: "N", the images asked about; retrieval leaves one out among them.
        catalog: "N", where the k shots of a prototype are drawn from; None draws them from the queries themselves.
        fallback: "N", where they are drawn from for a class that the catalog lacks.
    """

    queries: Bool[Tensor, "N"]
    catalog: Bool[Tensor, "N"] | None = None
    fallback: Bool[Tensor, "N"] | None = None
    gallery: Bool[Tensor, "N"] | None = None

    def within(self, mask: Bool[Tensor, "N"]) -> Part:
        """The same part in the manifest that `where(mask)` gives."""
        catalog = self.catalog[mask] if self.catalog is not None else None
        fallback = self.fallback[mask] if self.fallback is not None else None
        gallery = self.gallery[mask] if self.gallery is not None else None
        return Part(self.queries[mask], catalog, fallback, gallery)


@dataclass(frozen=True, slots=True)
class Division:
    """Masks over a manifest's rows; `train`, `val` and every part's queries are disjoint."""

    train: Bool[Tensor, "N"]
    val: Bool[Tensor, "N"]
    parts: Mapping[str, Part]
    notes: tuple[str, ...] = ()

    def queries(self) -> Bool[Tensor, "N"]:
        """The rows that some part asks about."""
        return torch.stack([torch.zeros_like(self.train), *(part.queries for part in self.parts.values())]).any(0)

    def without(self, gone: Bool[Tensor, "N"], note: str) -> Division:
        """The same division with these rows in no training, validation, catalog or fallback; queries stay."""

        def cut(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask & ~gone

        parts = {
            name: Part(p.queries, cut(p.catalog), cut(p.fallback), cut(p.gallery)) for name, p in self.parts.items()
        }
        return Division(self.train & ~gone, self.val & ~gone, parts, (*self.notes, note))

    def selects_on_new_classes(self, manifest: Manifest) -> bool:
        """Whether no class of the validation part is trained on."""
        labels = manifest.labels()
        return not bool(torch.isin(labels[self.val], labels[self.train]).any())

    def as_one(self, manifest: Manifest) -> Division:
        """The same rows, measured as one part, `all`: where not all that is trained on is in the manifest.

        Which of the measured classes are new is then not known.
        """
        part = Part(self.queries(), self.val, _where_lacking(self.train, self.val, manifest.labels()))
        return Division(self.train, self.val, {"all": part}, self.notes)

    def measured(self) -> Bool[Tensor, "N"]:
        """The rows that some part needs."""
        needed = torch.zeros_like(self.train)
        for part in self.parts.values():
            for mask in (part.queries, part.catalog, part.fallback, part.gallery):
                if mask is not None:
                    needed |= mask
        return needed

    def parts_within(self, mask: Bool[Tensor, "N"]) -> dict[str, Part]:
        """Each part in the manifest that `where(mask)` gives."""
        return {name: part.within(mask) for name, part in self.parts.items()}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {int(part.queries.sum()):,}" for name, part in self.parts.items())
        counts = f"{int(self.train.sum()):,} images to train on, {int(self.val.sum()):,} to select on"
        return f"{counts}; measured: {parts or 'none of them'}"


def divide(
    manifest: Manifest,
    kind: str,
    *,
    holdout: float = 0.2,
    seed: int = 42,
    val: float = 0.1,
    seen: float = 0.2,
    column: str = "group",
) -> Division:
    """Divide a manifest as a recipe's `split` says.

    Args:
        manifest: its `split` column, where it has one, is respected by "class_disjoint" and "official"; "grouped"
            divides anew, by group.
        kind: "class_disjoint", "official", "grouped" or "all" (everything is trained on, nothing measured here).
        holdout: share of the classes (or groups) that are tested on and never trained on.
        seed: of every shuffle.
        val: share of the remaining classes (or groups) to select on; none, with a note, where it is under two classes.
            "official": only where the column names no row to select on, and no trained class is measured.
        seen: share of each trained class's images kept back, where no `split` column says which.
        column: the group column of "grouped".

    Raises:
        InputError: nothing would be left to train on or to measure, or a column is missing.
    """
    match kind:
        case "class_disjoint":
            division = _class_disjoint(manifest, holdout, seed, val, seen)
        case "official":
            masks = _with_classes_to_select_on(manifest, _official_masks(manifest), val, seed)
            if masks["query"].any() or masks["gallery"].any():
                division = _query_gallery(manifest, masks)
            else:
                division = _official(manifest, masks)
        case "grouped":
            division = _official(manifest, _grouped_masks(manifest, column, holdout, val, seed))
        case "all":
            none = torch.zeros(len(manifest), dtype=torch.bool)
            return Division(~none, none, {})
        case _:
            raise InputError(f"split: {kind!r} is unknown; use class_disjoint, official, grouped or all")
    _refuse_empty(manifest, division)
    return division


def _class_disjoint(manifest: Manifest, holdout: float, seed: int, val: float, seen: float) -> Division:
    try:
        seen_classes, unseen_classes = class_disjoint(manifest.classes, holdout=holdout, seed=seed)
    except InputError as error:
        raise InputError(f"split.class_disjoint.{error}") from None
    notes = []
    trained_classes: tuple[str, ...] = seen_classes
    val_classes: tuple[str, ...] = ()
    if int(len(seen_classes) * val) >= 2:  # among images of one class every neighbour is right
        trained_classes, val_classes = class_disjoint(seen_classes, holdout=val, seed=seed)
    elif val:
        notes.append(f"{len(seen_classes)} classes are too few to keep {val:.0%} back: nothing is selected on")
    labels = manifest.labels()
    position = {name: i for i, name in enumerate(manifest.classes)}
    trained, selected, unseen = (
        torch.isin(labels, torch.tensor([position[name] for name in classes], dtype=torch.long))
        for classes in (trained_classes, val_classes, unseen_classes)
    )
    parts: dict[str, Part] = {}
    if "split" in manifest.names():
        masks = _official_masks(manifest)
        train, kept, test = trained & masks["train"], trained & masks["val"], trained & masks["test"]
        if test.any():
            parts["seen"] = Part(test, kept, _where_lacking(train, kept, labels))
        tested = unseen & masks["test"]
        if tested.any():
            catalog = unseen & masks["val"]
            parts["unseen"] = Part(tested, catalog, _where_lacking(unseen & masks["train"], catalog, labels))
        else:
            parts["unseen"] = Part(unseen)
            notes.append("the split column names no test image of an unseen class: all their images are tested on")
    else:
        back = (
            trained & holdout_images(labels, share=seen, seed=seed, ids=manifest.ids())
            if seen
            else torch.zeros_like(trained)
        )
        train = trained & ~back
        if back.any():
            parts["seen"] = Part(back, train)
        else:
            notes.append("no class has five images, so none is kept back: seen classes are not measured")
        parts["unseen"] = Part(unseen)
    if "seen" in parts and parts["unseen"].catalog is not None:
        parts["joint"] = _union(parts["seen"], parts["unseen"])
    return Division(train, selected, parts, tuple(notes))


def _official_masks(manifest: Manifest) -> dict[str, Tensor]:
    if "split" not in manifest.names():
        raise InputError(
            "split: official needs a `split` column with the words train, val, test; "
            f"the data has the columns {', '.join(manifest.names())}"
        )
    none = torch.zeros(len(manifest), dtype=torch.bool)
    return {"train": none, "val": none, "test": none, "query": none, "gallery": none} | official(
        manifest.column("split"), images=manifest.column("image")
    )


def _with_classes_to_select_on(
    manifest: Manifest, masks: Mapping[str, Tensor], val: float, seed: int
) -> Mapping[str, Tensor]:
    """Published class-disjoint sets name no validation part: without one, only the test half could be selected on."""
    labels = manifest.labels()
    trained = torch.unique(labels[masks["train"]])
    measured = masks["test"] | masks["query"] | masks["gallery"]
    if masks["val"].any() or int(len(trained) * val) < 2 or torch.isin(labels[measured], trained).any():
        return masks
    _, kept = class_disjoint([manifest.classes[i] for i in trained.tolist()], holdout=val, seed=seed)
    names = set(kept)
    back = masks["train"] & torch.isin(labels, torch.tensor([i for i in trained if manifest.classes[i] in names]))
    return {**masks, "train": masks["train"] & ~back, "val": back}


def _grouped_masks(manifest: Manifest, column: str, holdout: float, val: float, seed: int) -> dict[str, Tensor]:
    if column not in manifest.names():
        raise InputError(f"split.grouped.column: no column {column!r}; there are {', '.join(manifest.names())}")
    groups = manifest.column(column)
    try:
        test = grouped(groups, holdout=holdout, seed=seed)
    except InputError as error:
        raise InputError(f"split.grouped.{error}") from None
    rest = [i for i, held in enumerate(test.tolist()) if not held]
    selected = torch.zeros_like(test)
    if int(len({groups[i] for i in rest}) * val) >= 1:
        selected[rest] = grouped([groups[i] for i in rest], holdout=val, seed=seed)
    return {"train": ~test & ~selected, "val": selected, "test": test}


def _official(manifest: Manifest, masks: Mapping[str, Tensor]) -> Division:
    """Parts as given: the test images of trained classes and of others apart, if there are others."""
    train, val, test = masks["train"], masks["val"], masks["test"]
    labels = manifest.labels()
    known = torch.isin(labels, torch.unique(labels[train]))
    if not (test & ~known).any():
        return Division(train, val, {"all": Part(test, val, _where_lacking(train, val, labels))})
    parts = {"unseen": Part(test & ~known)}
    if (test & known).any():
        catalog = val & known
        parts["seen"] = Part(test & known, catalog, _where_lacking(train, catalog, labels))
    return Division(train, val, parts)


def _query_gallery(manifest: Manifest, masks: Mapping[str, Tensor]) -> Division:
    """Each query is looked for in the gallery alone; k shots are drawn from the gallery too."""
    query, gallery = masks["query"], masks["gallery"]
    if masks["test"].any() or not (query.any() and gallery.any()):
        raise InputError("split: official takes query and gallery together, and no test beside them")
    labels = manifest.labels()
    known = torch.isin(labels[query], labels[masks["train"]]).any()
    return Division(masks["train"], masks["val"], {"all" if known else "unseen": Part(query, gallery, gallery=gallery)})


def _where_lacking(
    fallback: Bool[Tensor, "N"], catalog: Bool[Tensor, "N"], labels: Int[Tensor, "N"]
) -> Bool[Tensor, "N"]:
    """The rows of classes that the catalog lacks: only those have to be embedded."""
    return fallback & ~torch.isin(labels, labels[catalog])


def _union(a: Part, b: Part) -> Part:
    def either(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return y if x is None else x if y is None else x | y

    return Part(a.queries | b.queries, either(a.catalog, b.catalog), either(a.fallback, b.fallback))


def _refuse_empty(manifest: Manifest, division: Division) -> None:
    classes = len(torch.unique(manifest.labels()[division.train]))
    if classes < 2:
        raise InputError(
            f"the split leaves {classes} classes to train on; at least 2 are needed: "
            "lower split.class_disjoint.holdout or bring more classes"
        )
    if not division.measured().any():
        raise InputError("the split leaves nothing to measure: raise split.class_disjoint.holdout or name test images")
