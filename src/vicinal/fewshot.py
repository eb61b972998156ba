"""A table of few-shot heads: methods x shots x seeds on one data set, from cached features to figures with intervals.

The shots are CoOp's draws (Zhou et al. 2022, arXiv:2109.01134): K rows a class of the train rows, by the seed, and
min(K, 4) of the val rows where a policy wants them. With a published split file they are the published shots.

The folder that it writes:

    table.csv         one row a cell: data, model, adapter, method, shots, seed, policy, accuracy, low, high, n (the
                      classes), part, queries
    summary.csv       the same columns, pooled over seeds (`seed` says which): the interval holds classes and seeds
    differences.csv   paired: adapted features less frozen ones, and each method less the reference (zero-shot, or
                      prototypes where there is no text)
    results.json      all of it, how each cell's hyper-parameters came about, the settings, the environment
    accuracy.png      accuracy over shots
    report.html       the same on a page
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sklearn.base import clone
from torch import Tensor

from vicinal.bring import bring, bring_path, open_uri, reads_text
from vicinal.data.benchmarks import BENCHMARKS, load_benchmark
from vicinal.data.check import leaks as find_leaks
from vicinal.data.manifest import Manifest, row_list
from vicinal.data.splits import coop_shots, grouped, holdout_images
from vicinal.data.splits import official as official_parts
from vicinal.data.templates import GENERIC, TEMPLATES
from vicinal.data.transforms import AUGMENT
from vicinal.embedding import Precision, default_cache, embed, embed_classes, embed_views, pick_device
from vicinal.evaluation.few_shot import Features, FewShot, few_shot_scores
from vicinal.evaluation.few_shot_page import few_shot_page, few_shot_plot
from vicinal.evaluation.intervals import mean, paired_difference
from vicinal.evaluation.metrics import topk
from vicinal.evaluation.wording import as_number
from vicinal.ground import SAME_PICTURE, Say, environment
from vicinal.heads import HEADS, Head, Selection
from vicinal.heads.selection import check_policy
from vicinal.models.encoder import Encoder
from vicinal.recipe import Data, apply_override
from vicinal.types import Embeddings, Estimate, InputError, PerQuery

__all__ = ["COLUMNS", "Cell", "Settings", "Task", "bring_source", "fewshot"]

COLUMNS = (
    "data", "model", "adapter", "method", "shots", "seed", "policy", "accuracy", "low", "high", "n", "part", "queries",
)  # fmt: skip
DEFAULT_METHODS = (
    "zero_shot", "nearest_prototype", "tip_adapter", "tip_x", "ape", "gda", "proker", "linear_probe",
)  # fmt: skip


class Settings(BaseModel):
    """What a table is of. Every key can be given on the command line as `key=value`.

    Args:
        methods: names of `vicinal.heads.HEADS`.
        shots: the K's. CoOp: 1, 2, 4, 8, 16.
        seeds: of the draws. CoOp: 1, 2, 3.
        policy: how hyper-parameters are chosen; see `vicinal.heads.selection`. `oracle_test` is refused.
        transfer: the folder of another table, whose hyper-parameters policy transfer takes (medians over its seeds).
        adapter: run folders, models or files of embeddings, each of which gives adapted features beside the frozen
            ones; every method that can use them is measured with and without.
        views: random views of each support image; 1 takes its evaluation view. The published heads: 10.
        views_mode: "mean" averages the views' raw vectors (Tip-Adapter, Tip-X, APE); "stack" keeps every view (GDA).
        augment: of the views.
        text: false leaves class names away, though the model reads text.
        columns: the names that vicinal uses -> those of the table: `columns.label=brand`.
        names: the column that says what a class is called in prompts; None: `name` where there is one, else the label.
        templates: prompts with `{}` for the name, or a data set of `vicinal.data.templates.TEMPLATES`. None: those of
            the benchmark, else "a photo of a {}.".
        logit_scale: on zero-shot similarities; None: what the model learnt, else 100.
        shift: a column; support is drawn from its rows `source`, and every other value is asked about as a part.
        source: the value of `shift` that support is drawn from.
        also: more data sets to ask about, with labels of the same names (ImageNet-V2, ImageNet-Sketch).
        candidates: "part" lets a part's queries be given the part's classes alone (ImageNet-A, -R), "all" every class.
        group: a column that never straddles: whole groups are held out (photographers, shops). Where a column `split`
            says who is asked about, rows of the same groups are not drawn, nor looked at.
        holdout: the share that is asked about where the data has no `split` column: of each class, or of the groups.
        split_seed: of that choice.
        lists: a folder of published draws, `shot_K-seed_S.json`, in the form of cross-modal adaptation's `indices`,
            taken instead of drawing. ImageNet's draws are to be had in no other way.
        fewer: a class with fewer images than shots stops ("raise"), or gives all it has, as in CoOp ("take"); None:
            "take" for published data sets, else "raise".
        leaks: the same pixels in a support image and a query stop ("raise"), or the support image goes ("drop").
        min_images: leaves smaller classes out.
        data: what the data set is called in the files; None: the name of its file or folder.
        model: what the model is called in the files; None: the end of its address.
        root: where published data sets lie.
        size: input size in pixels.
        device: to embed on.
        precision: to embed in.
        cache: where embeddings are kept; "auto" is the user's cache folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: list[str] = list(DEFAULT_METHODS)
    shots: list[Annotated[int, Field(ge=1)]] = [1, 2, 4, 8, 16]
    seeds: list[int] = [1, 2, 3]
    policy: str = "support_cv"
    transfer: str | None = None
    adapter: list[str] = []
    views: Annotated[int, Field(ge=1)] = 1
    views_mode: Literal["mean", "stack"] = "mean"
    augment: str = "standard"
    text: bool = True
    columns: dict[str, str] = {}
    names: str | None = None
    templates: list[str] | str | None = None
    logit_scale: Annotated[float, Field(gt=0)] | None = None
    shift: str | None = None
    source: str | None = None
    also: list[str] = []
    candidates: Literal["all", "part"] = "all"
    group: str | None = None
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.5
    split_seed: int = 42
    lists: str | None = None
    fewer: Literal["raise", "take"] | None = None
    leaks: Literal["raise", "drop"] = "raise"
    min_images: Annotated[int, Field(ge=1)] = 1
    data: str | None = None
    model: str | None = None
    root: str = "~/data"
    size: int | None = None
    device: str = "auto"
    precision: Precision = "auto"
    cache: str | None = "auto"

    @classmethod
    def parse(cls, words: Sequence[str]) -> Settings:
        """From `key=value` words; a value is read as YAML, and one value stands for a list of one.

        Raises:
            InputError: an unknown key, or a value that it does not take.

        >>> Settings.parse(["shots=[1,4]", "methods=gda", "policy=fixed"]).shots
        [1, 4]
        """
        content: dict[str, Any] = {}
        for word in words:
            key, _, text = word.partition("=")
            if key == "templates" and "{}" in text and not text.startswith(("[", '"', "'")):
                content[key] = text  # a prompt is no YAML
            else:
                apply_override(content, word)
        for key in ("methods", "shots", "seeds", "adapter", "also"):
            if key in content and not isinstance(content[key], list):
                content[key] = [content[key]]
        if isinstance(content.get("source"), int | float):
            content["source"] = str(content["source"])
        try:
            settings = cls.model_validate(content)
        except ValidationError as error:
            raise InputError(_explain(error)) from None
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse what no data could mend.

        Raises:
            InputError: an unknown method, policy or augmentation, a policy that chooses on test, keys that need others.
        """
        unknown = [name for name in self.methods if name not in HEADS]
        if unknown or not self.methods:
            raise InputError(f"methods: {', '.join(map(repr, unknown)) or 'none'}; there are {', '.join(HEADS)}")
        for key in ("methods", "shots", "seeds", "adapter", "also"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise InputError(f"{key}={values} names one twice")
        if not self.shots or not self.seeds:
            raise InputError("shots and seeds hold at least one number each")
        check_policy(self.policy, self.policy in ("fewshot_val", "full_val"))
        if (self.policy == "transfer") != (self.transfer is not None):
            raise InputError("policy=transfer and transfer=FOLDER of another table go together")
        if (self.shift is None) != (self.source is None):
            raise InputError("shift=COLUMN and source=VALUE, what support is drawn from, go together")
        if self.shift is not None and self.group is not None:
            raise InputError("give shift or group, not both: a shift holds out whole values of its column already")
        if self.augment not in AUGMENT:
            raise InputError(f"augment={self.augment!r} is unknown; there are {', '.join(AUGMENT)}")
        if self.views == 1 and self.views_mode == "stack":
            raise InputError("views_mode=stack has nothing to stack with views=1; say views=10")
        if isinstance(self.templates, str) and self.templates not in TEMPLATES and "{}" not in self.templates:
            raise InputError(f"templates={self.templates!r} has no {{}} for the name, nor is it a data set of ours")


def fewshot(model: str, source: str | Path, settings: Settings, out: str | Path, *, say: Say = print) -> Path:
    """Run the table and write it; see the module's text.

    Args:
        model: an address, a folder, or a run folder (its tuned model): the frozen tower, and who names classes.
        source: a folder, a table, COCO JSON, VOC, the name of a benchmark, or a recipe, whose `data` is taken.
        settings: see `Settings`.
        out: the folder to write.
        say: is told each stage in one line.

    Returns:
        The page.

    Raises:
        InputError: something the user gave is wrong: found before the first image is embedded, wherever it can be.
    """
    settings.check()
    out = Path(out).expanduser()
    name, kind, manifest = bring_source(source, settings)
    say(f"data: {len(manifest):,} images of {len(manifest.classes):,} classes")
    data = {"name": settings.data or name, "images": len(manifest), "classes": len(manifest.classes)}
    task = Task.of(manifest, settings, published=kind == "benchmark" and name.startswith(("coop_", "imagenet")))
    also = {}
    for other in settings.also:
        other_name, _, more = bring_source(other, settings)
        also[other_name] = _aligned(more, manifest.classes, other_name)
    task.draws(settings)  # what cannot be drawn is said before the first image is embedded
    transferred = _transferred(settings)
    encoder = open_uri(model, size=settings.size)
    texts = _texts(encoder, manifest, settings, name)
    if texts is None:
        say("text: none; heads work on images alone")
    mute = [name for name in settings.methods if texts is None and HEADS[name].text_use == "needed"]
    if mute:
        say(f"left out, since they need class names: {', '.join(mute)}")
    methods = {name: _head(name, settings, encoder) for name in settings.methods if name not in mute}
    if not methods:
        raise InputError("no method is left: all of them need class names, and the model reads no text")

    adapters = {_adapter_name(path): path for path in settings.adapter}
    if len(adapters) < len(settings.adapter):
        raise InputError("adapter: two of them have one name; give folders of different names")
    say("embedding: frozen")
    vectors, task, draws = _drawn(encoder, manifest, task, settings, say)
    data |= {"pool": int(task.pool.sum()), "val": int(task.val.sum())}
    data |= {"parts": {part: int(mask.sum()) for part, mask in task.parts.items()}, "notes": list(task.notes)}
    needed = task.needed(draws)  # of a million rows, a few thousand
    manifest, task = manifest.where(needed), task.within(needed)
    draws = {key: (shots[needed], val[needed]) for key, (shots, val) in draws.items()}
    drawn = torch.stack([shots for shots, _ in draws.values()]).any(0)
    spaces = {"": _Space(vectors, encoder, None).complete(manifest, drawn, also, settings)}
    for adapter, path in adapters.items():
        say(f"embedding: {adapter}")
        spaces[adapter] = _Space.adapted(path, manifest, settings).complete(manifest, drawn, also, settings)

    labels = _Names(settings.model or _short(model), str(data["name"]))
    cells = list(_cells(labels, manifest, methods, spaces, task, draws, also, texts, transferred, settings, say))
    results = {
        "data": data | {"also": {part: len(more) for part, more in also.items()}},
        "model": {"source": encoder.source, "licence": encoder.licence, "text": texts is not None},
        "settings": settings.model_dump(mode="json"),
        "few_shot": settings.policy != "full_val",
        "cells": [cell.record() for cell in cells],
        "summary": (summary := _summary(cells)),
        "differences": (differences := _differences(cells)),
        "environment": environment(pick_device(settings.device), settings.precision),
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "table.csv", COLUMNS, [cell.row() for cell in cells])
    _write_csv(out / "summary.csv", COLUMNS, summary)
    _write_csv(out / "differences.csv", DIFFERENCES, differences)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    few_shot_plot(results, out / "accuracy.png")
    page = out / "report.html"
    page.write_text(few_shot_page(results), encoding="utf-8")
    for line in _lines(summary):
        say(line)
    say(f"report: {page}")
    return page


def bring_source(source: str | Path, settings: Settings) -> tuple[str, str, Manifest]:
    """The name, the kind and the manifest of a source: see `fewshot`.

    Raises:
        InputError: it is not there, or not what it should be.
    """
    path = Path(source).expanduser()
    if str(source) in BENCHMARKS and not path.exists():
        name, kind, manifest = str(source), "benchmark", load_benchmark(str(source), root=settings.root)
    elif path.suffix in (".yaml", ".yml"):
        data = _data_of(path)
        kind = data.source[0]
        name = data.source[1].name if kind == "benchmark" else path.stem
        manifest = bring(data)
    else:
        kind, manifest = bring_path(path, settings.columns)
        name = path.parent.name if path.stem in ("table", "train") and path.parent.name else path.stem
    if not manifest.classes:
        raise InputError(f"{source} has no labels, and few-shot heads learn from them; give a column label")
    if settings.min_images > 1:
        sizes = torch.bincount(manifest.labels(), minlength=len(manifest.classes))
        manifest = manifest.where(sizes[manifest.labels()] >= settings.min_images)
        if not len(manifest):
            raise InputError(f"min_images={settings.min_images} leaves no class; the largest has {sizes.max()} images")
    return name, kind, manifest.compact()


def _data_of(path: Path) -> Data:
    """The `data` section of a recipe; nothing else in it is looked at."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Data.model_validate(content["data"])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no recipe with a key data ({error})") from error
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from None


Draws = dict[tuple[int, int], tuple[Bool[Tensor, "N"], Bool[Tensor, "N"]]]
"""(K, seed) -> the support rows, and the validation rows."""


@dataclass(frozen=True, slots=True)
class Task:
    """Which rows of a manifest are what.

    Args:
        labels: "N", positions in `classes`.
        images: "N", the path of each row.
        classes: names.
        pool: "N", what support is drawn from.
        val: "N", what a validation policy may look at.
        parts: name -> "N", what is asked about.
        take: a class with fewer images than shots gives all it has.
        notes: what was left out, and why.
    """

    labels: Int[Tensor, "N"]
    images: tuple[str, ...]
    classes: tuple[str, ...]
    pool: Bool[Tensor, "N"]
    val: Bool[Tensor, "N"]
    parts: Mapping[str, Bool[Tensor, "N"]]
    take: bool
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest, settings: Settings, *, published: bool = False) -> Task:
        """Divide by the column `split`, by groups, by a shift, or by holding images of each class out.

        Raises:
            InputError: a column or value is missing, a part is empty, or a class is asked about and has no image that
                support could be drawn from.
        """
        labels = manifest.labels()
        none = torch.zeros(len(manifest), dtype=torch.bool)
        official = _official(manifest) if "split" in manifest.names() else None
        notes: list[str] = []
        if settings.shift is not None:
            pool, val, parts = _shifted(manifest, settings, official)
        elif settings.group is not None and official is not None:
            pool, val = _apart(manifest.column(settings.group), official)
            parts = {"test": official["test"]}
            if gone := int((official["train"] & ~pool).sum() + (official["val"] & ~val).sum()):
                notes.append(f"{gone} images are not drawn: their {settings.group} is asked about")
        elif settings.group is not None:
            test = grouped(manifest.column(settings.group), holdout=settings.holdout, seed=settings.split_seed)
            pool, val, parts = ~test, none, {"test": test}
        elif official is not None:
            pool, val, parts = official["train"], official["val"], {"test": official["test"]}
        else:
            test = holdout_images(
                labels, share=settings.holdout, seed=settings.split_seed, at_least=2, ids=manifest.ids()
            )
            pool, val, parts = ~test, none, {"test": test}
        have = torch.bincount(labels[pool], minlength=len(manifest.classes))
        for part, mask in parts.items():
            lost = mask & (have[labels] == 0)
            if lost.any() and settings.shift is None:
                first = int(labels[lost][0])
                raise InputError(
                    f"class {manifest.classes[first]!r} is empty where support is drawn from, and has "
                    f"{int((labels[lost] == first).sum())} images to ask about ({len(torch.unique(labels[lost]))} such "
                    "classes); add images of it to the train rows, or leave the class out (min_images)"
                )
            if lost.any():
                notes.append(f"{part}: {int(lost.sum())} images are of classes that {settings.source} does not have")
        parts = {part: mask & (have[labels] > 0) for part, mask in parts.items()}
        if not any(mask.any() for mask in parts.values()):
            raise InputError("there is not one image to ask about whose class has support; see holdout, shift, split")
        notes += [f"{part}: no image to ask about" for part, mask in parts.items() if not mask.any()]
        parts = {part: mask for part, mask in parts.items() if mask.any()}
        take = settings.fewer == "take" or (settings.fewer is None and published)
        return cls(labels, tuple(manifest.column("image")), manifest.classes, pool, val, parts, take, tuple(notes))

    def draws(self, settings: Settings) -> Draws:
        """(K, seed) -> the support rows and the validation rows.

        Raises:
            InputError: a class has fewer images than shots, or a policy wants validation rows and there are none.
        """
        if settings.lists is not None:
            return {(k, seed): self._listed(settings.lists, k, seed) for k in settings.shots for seed in settings.seeds}
        have = torch.bincount(self.labels[self.pool], minlength=len(self.classes))
        few = (have > 0) & (have < max(settings.shots))
        if few.any() and not self.take:
            first = int(few.nonzero()[0])
            others = f", and so do {int(few.sum()) - 1} other classes" if few.sum() > 1 else ""
            raise InputError(
                f"class {self.classes[first]!r} has {int(have[first])} images to draw from, fewer than the "
                f"{max(settings.shots)} shots{others}; take fewer shots, leave small classes out (min_images), ask "
                "about fewer images (holdout), or let such a class give all it has (fewer=take)"
            )
        if settings.policy in ("fewshot_val", "full_val") and not self.val.any():
            raise InputError(
                f"policy {settings.policy} needs validation rows, and the data has none (a column split with val); "
                "support_cv needs none"
            )
        found = {}
        for k in settings.shots:
            for seed in settings.seeds:
                shots, val = self.pool.clone(), self.val.clone()
                shots[self.pool], val[self.val] = coop_shots(
                    self.labels[self.pool], self.labels[self.val], k, seed=seed
                )
                found[k, seed] = shots, self.val if settings.policy == "full_val" else val
        return found

    def _listed(self, folder: str, k: int, seed: int) -> tuple[Bool[Tensor, "N"], Bool[Tensor, "N"]]:
        """The draw of a published list: the rows whose paths end as its paths do."""
        path = Path(folder).expanduser() / f"shot_{k}-seed_{seed}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            listed = [[str(item["impath"]) for item in content[part]["data"]] for part in ("train", "val")]
        except OSError as error:
            raise InputError(f"lists: {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"lists: {path} does not hold train and val with data and impath ({error})") from error
        row = {image: i for i, image in enumerate(self.images)}
        asked = torch.stack(list(self.parts.values())).any(0)
        found = []
        for images in listed:
            mask = torch.zeros_like(self.pool)
            for image in images:
                words = image.split("/")
                ends = ("/".join(words[i:]) for i in range(len(words)))
                at = next((row[end] for end in ends if end in row), None)
                if at is None:
                    raise InputError(f"lists: {path} names {image}, which the data does not have")
                if asked[at]:
                    raise InputError(f"lists: {path} names {image}, which is asked about; it must not be drawn as well")
                mask[at] = True
            found.append(mask & (self.pool | self.val))  # without what leaks took out
        return found[0], found[1]

    def needed(self, draws: Draws) -> Bool[Tensor, "N"]:
        """The rows that are drawn, looked at or asked about in some cell."""
        return torch.stack([*self.parts.values(), *(mask for both in draws.values() for mask in both)]).any(0)

    def within(self, rows: Bool[Tensor, "N"]) -> Task:
        """The same task in the manifest that `where(rows)` gives."""
        images = tuple(self.images[i] for i in rows.nonzero().flatten().tolist())
        parts = {name: mask[rows] for name, mask in self.parts.items()}
        return replace(
            self, labels=self.labels[rows], images=images, pool=self.pool[rows], val=self.val[rows], parts=parts
        )

    def without_leaks(
        self, manifest: Manifest, draws: Draws, vectors: Float[Tensor, "n D"], settings: Settings
    ) -> Task:
        """Not to be drawn or looked at: rows whose picture is asked about. The same task, where there is none.

        Equal pixels have equal vectors up to rounding, so only pictures with such a neighbour are opened.

        Args:
            manifest: N rows.
            draws: of this task.
            vectors: of the rows that the draws need.
            settings: of the table.

        Raises:
            InputError: there are such pictures, and `leaks` is "raise".
        """
        needed = self.needed(draws)
        asked = torch.stack(list(self.parts.values())).any(0)
        shown = needed & ~asked
        unit = F.normalize(vectors, dim=1)
        near = {True: unit[asked[needed]], False: unit[shown[needed]]}
        sides = {"asked about": asked.clone(), "drawn from": shown.clone()}
        for is_asked, mask in ((True, sides["asked about"]), (False, sides["drawn from"])):
            mask[mask.clone()] = topk(near[is_asked], near[not is_asked], 1)[0][:, 0] > SAME_PICTURE
        found = find_leaks(manifest, sides)
        if not found:
            return self
        if settings.leaks == "raise":
            pairs = "; ".join(f"{a.file} ({a.part}) and {a.other} ({a.other_part})" for a in found[:3])
            raise InputError(
                f"the support set could hold {len(found)} query images: the same pixels stand in {pairs}. "
                "`vicinal check` lists all that are in the data twice; remove one of each, or say leaks=drop"
            )
        twice = [leak.file if leak.part == "drawn from" else leak.other for leak in found]
        gone = torch.from_numpy(np.isin(np.array(self.images), twice)) & sides["drawn from"]
        pool = self.pool & ~gone
        have = torch.bincount(self.labels[pool], minlength=len(self.classes))
        parts = {name: mask & (have[self.labels] > 0) for name, mask in self.parts.items()}
        return replace(self, pool=pool, val=self.val & ~gone, parts=parts)


def _drawn(
    encoder: Encoder, manifest: Manifest, task: Task, settings: Settings, say: Say
) -> tuple[Float[Tensor, "n D"], Task, Draws]:
    """The vectors of the rows that the draws need, none of which is drawn and asked about under two names."""
    before = task
    while True:
        draws = task.draws(settings)
        vectors = embed(encoder, manifest.where(task.needed(draws)), **_embedding(settings)).vectors
        cleaned = task.without_leaks(manifest, draws, vectors, settings)
        if cleaned is task:
            break
        task = cleaned  # and drawn again
    gone = int((before.pool & ~task.pool).sum() + (before.val & ~task.val).sum())
    if gone:
        note = f"{gone} images are not drawn: the same pixels are asked about"
        say(note)
        task = replace(task, notes=(*task.notes, note))
    return vectors, task, draws


def _official(manifest: Manifest) -> dict[str, Bool[Tensor, "N"]]:
    """train, val and test, by the column `split`."""
    found = official_parts(manifest.column("split"), images=manifest.column("image"), name="the column split")
    none = torch.zeros(len(manifest), dtype=torch.bool)
    parts = {name: found.get(name, none) for name in ("train", "val", "test")}
    if not (parts["train"].any() and parts["test"].any()):
        raise InputError(
            f"the column split names {', '.join(found)}; few-shot needs train rows to draw from and test rows to ask "
            "about. A data set of test rows alone is asked about by also=…, after a fit on another"
        )
    return parts


def _apart(
    groups: Sequence[Any], official: Mapping[str, Bool[Tensor, "N"]]
) -> tuple[Bool[Tensor, "N"], Bool[Tensor, "N"]]:
    """Pool and val of an official division without the groups that are asked about; val without those of the pool."""
    of = {part: {groups[i] for i in mask.nonzero().flatten().tolist()} for part, mask in official.items()}
    asked = torch.tensor([group is not None and group in of["test"] for group in groups])
    pool = official["train"] & ~asked
    drawn = {groups[i] for i in pool.nonzero().flatten().tolist()}
    known = torch.tensor([group is not None and group in drawn for group in groups])
    return pool, official["val"] & ~asked & ~known


def _shifted(
    manifest: Manifest, settings: Settings, official: Mapping[str, Bool[Tensor, "N"]] | None
) -> tuple[Bool[Tensor, "N"], Bool[Tensor, "N"], dict[str, Bool[Tensor, "N"]]]:
    """Pool and val of one source; the parts: what is left of it, and every other source."""
    assert settings.shift is not None
    values = [None if value is None else str(value) for value in manifest.column(settings.shift)]
    missing = [i for i, value in enumerate(values) if value is None]
    if missing:
        raise InputError(f"{settings.shift} says nothing in {row_list(np.array(missing))}; fill it in")
    known = sorted({value for value in values if value is not None})
    if settings.source not in known or len(known) < 2:
        raise InputError(
            f"shift={settings.shift}: source={settings.source} of {', '.join(known[:12])}"
            f"{' …' if len(known) > 12 else ''}; name one of several"
        )
    if len(known) > 50:
        raise InputError(
            f"{settings.shift} has {len(known)} values; hold some of them out together: group={settings.shift}"
        )
    own = torch.tensor([value == settings.source for value in values])
    if official is None:
        labels = manifest.labels()
        ids = np.array(manifest.ids(), dtype=object)[own.numpy()].tolist()
        test = own.clone()
        test[own] = holdout_images(labels[own], share=settings.holdout, seed=settings.split_seed, at_least=2, ids=ids)
        pool, val, other = own & ~test, torch.zeros_like(own), ~own
    else:
        pool, val, test = own & official["train"], own & official["val"], own & official["test"]
        other = ~own & ~official["train"] & ~official["val"]
    parts = {f"{settings.shift}={settings.source}": test}
    for value in known:
        if value != settings.source:
            parts[f"{settings.shift}={value}"] = other & torch.tensor([v == value for v in values])
    if not pool.any():
        raise InputError(f"{settings.shift}={settings.source} has no train rows to draw support from")
    return pool, val, parts


# -------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True, slots=True)
class _Space:
    """Vectors of one tower.

    Args:
        plain: "N D", unit rows, of the evaluation views of the manifest's rows.
        tower: that makes more of them; None: they came from a file.
        views: "N V D", raw; rows never drawn are not filled in. None: one view, `plain`.
        also: further data set -> its plain vectors.
    """

    plain: Float[Tensor, "N D"]
    tower: Encoder | None
    views: Float[Tensor, "N V D"] | None
    also: Mapping[str, Float[Tensor, "M D"]] = field(default_factory=dict)

    @classmethod
    def adapted(cls, path: str, manifest: Manifest, settings: Settings) -> _Space:
        """The space of a run's tuned encoder, of a model, or of a file of embeddings with the manifest's ids."""
        if not path.endswith(".safetensors"):
            tower = open_uri(path, size=settings.size)
            return cls(embed(tower, manifest, **_embedding(settings)).vectors, tower, None)
        given = Embeddings.load(path)
        row = {name: i for i, name in enumerate(given.ids)}
        missing = [name for name in manifest.ids() if name not in row]
        if missing:
            raise InputError(
                f"adapter {path} lacks {len(missing)} images of the data, the first {missing[0]}; embed the same table"
            )
        return cls(given.vectors[[row[name] for name in manifest.ids()]], None, None)

    def complete(
        self, manifest: Manifest, drawn: Bool[Tensor, "N"], also: Mapping[str, Manifest], settings: Settings
    ) -> _Space:
        """With the views of what is drawn, and the other data sets."""
        if self.tower is None:
            if settings.views > 1 or also:
                raise InputError(
                    "an adapter given as a file of embeddings has no views, and no other data sets: give a run"
                )
            return self
        views = None
        if settings.views > 1:
            found = embed_views(
                self.tower,
                manifest.where(drawn),
                views=settings.views,
                augment=settings.augment,
                **_embedding(settings),
            )
            views = found.new_zeros(len(manifest), *found.shape[1:])
            views[drawn] = found
        others = {name: embed(self.tower, more, **_embedding(settings)).vectors for name, more in also.items()}
        return replace(self, views=views, also=others)

    def support(self, rows: Bool[Tensor, "N"], mode: str) -> Float[Tensor, "n D"]:
        """Their support vectors: one a row, or with mode "stack" one a view, a row's views together."""
        if self.views is None:
            return self.plain[rows]
        if mode == "mean":
            return F.normalize(self.views[rows].mean(1), dim=1)
        return F.normalize(self.views[rows], dim=2).flatten(0, 1)


def _embedding(settings: Settings) -> dict[str, Any]:
    cache = default_cache() if settings.cache == "auto" else settings.cache
    return {"cache": cache, "device": settings.device, "precision": settings.precision}


def _features(
    task: Task, ids: Sequence[str], rows: Bool[Tensor, "N"], frozen: _Space, adapted: _Space | None, mode: str | None
) -> Features:
    """The rows for a head; `mode` of their views, or None for the evaluation view."""
    each = frozen.views.shape[1] if mode == "stack" and frozen.views is not None else 1
    names = tuple(ids[i] for i in rows.nonzero().flatten().tolist() for _ in range(each))

    def of(space: _Space) -> Float[Tensor, "n D"]:
        return space.plain[rows] if mode is None else space.support(rows, mode)

    labels = task.labels[rows].repeat_interleave(each)
    return Features(of(frozen), labels, names, None if adapted is None else of(adapted))


def _aligned(manifest: Manifest, classes: tuple[str, ...], name: str) -> Manifest:
    """Another data set, its labels positions in the first one's classes; only its test rows, where it says so."""
    if "split" in manifest.names():
        found = official_parts(manifest.column("split"), name=f"the column split of {name}")
        manifest = manifest.where(found["test"]) if "test" in found else manifest
    manifest = manifest.compact()
    strange = [word for word in manifest.classes if word not in set(classes)]
    if strange:
        raise InputError(
            f"{name} has class {strange[0]!r} ({len(strange)} such), which the first data set does not have"
        )
    return manifest.with_classes(classes)


def _texts(encoder: Encoder, manifest: Manifest, settings: Settings, data: str) -> Float[Tensor, "C D"] | None:
    """A vector for each class, by its name; None without text.

    Raises:
        InputError: a class without a name.
    """
    if not settings.text or not reads_text(encoder):
        return None
    column = settings.names or ("name" if "name" in manifest.names() else None)
    names = list(manifest.classes)
    if column is not None:
        called: dict[int, str] = {}
        for label, value in zip(manifest.labels().tolist(), manifest.column(column), strict=True):
            if value is not None and str(value).strip():
                called.setdefault(label, str(value))
        nameless = [word for label, word in enumerate(manifest.classes) if label not in called]
        if nameless:
            raise InputError(
                f"class {nameless[0]!r} has no name in the column {column} ({len(nameless)} such classes); fill it in, "
                "or leave text away: text=false"
            )
        names = [called[label] for label in range(len(names))]
    match settings.templates:
        case None:
            templates = TEMPLATES.get(data.removeprefix("coop_"), GENERIC)
        case str(word):
            templates = TEMPLATES.get(word, (word,))
        case several:
            templates = tuple(several)
    written = [name.replace("_", " ") for name in names]
    return embed_classes(encoder, written, templates, device=settings.device, precision=settings.precision)


# ----------------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True, slots=True)
class _Names:
    model: str
    data: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One head, fitted on one draw, asked about one part."""

    names: _Names
    adapter: str
    method: str
    shots: int
    seed: int
    part: str
    selection: Selection
    scores: PerQuery
    estimate: Estimate
    seconds: float

    def row(self) -> dict[str, Any]:
        """As a line of table.csv."""
        values = (
            self.names.data, self.names.model, self.adapter, self.method, self.shots, self.seed, self.selection.policy,
            *_numbers(self.estimate), self.part, self.estimate.queries,
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))

    def record(self) -> dict[str, Any]:
        """As in results.json: how the hyper-parameters came about, too."""
        return self.row() | {"selection": asdict(self.selection), "seconds": round(self.seconds, 3)}


def _cells(
    names: _Names,
    manifest: Manifest,
    methods: Mapping[str, Head],
    spaces: Mapping[str, _Space],
    task: Task,
    draws: Draws,
    also: Mapping[str, Manifest],
    texts: Float[Tensor, "C D"] | None,
    transferred: Mapping[tuple[str, str, int], Mapping[str, float]],
    settings: Settings,
    say: Say,
) -> Iterator[Cell]:
    ids, frozen = manifest.ids(), spaces[""]
    wanted = {name: torch.unique(more.labels()) for name, more in also.items() if settings.candidates == "part"} | (
        {part: torch.unique(task.labels[mask]) for part, mask in task.parts.items()}
        if settings.candidates == "part"
        else {}
    )
    for space_name, space in spaces.items():
        adapted = space if space_name else None
        asked = {part: _features(task, ids, mask, frozen, adapted, None) for part, mask in task.parts.items()}
        for name, more in also.items():
            own = tuple(f"{name}: {i}" for i in more.ids())
            asked[name] = Features(
                frozen.also[name], more.labels(), own, None if adapted is None else adapted.also[name]
            )
        usable = {name: head for name, head in methods.items() if adapted is None or _takes_adapted(head, texts)}
        for (k, seed), (shots, val) in draws.items():
            support = _features(task, ids, shots, frozen, adapted, settings.views_mode)
            validates = settings.policy in ("fewshot_val", "full_val")
            held = _features(task, ids, val, frozen, adapted, None) if validates else None
            told = []
            for method, head in usable.items():
                started = time.perf_counter()
                found = few_shot_scores(
                    _set(head, seed, _moved(transferred, space_name, method, k, settings)),
                    support,
                    asked,
                    shots=None if task.take else k,
                    text=texts,
                    validation=held,
                    candidates=wanted,
                )
                spent = time.perf_counter() - started
                for part, scores in found.scores.items():
                    estimate = mean(scores)["accuracy"]
                    yield Cell(names, space_name, method, k, seed, part, found.selection, scores, estimate, spent)
                told.append(f"{method} {mean_of(found):.3f}")
            say(f"{space_name or 'frozen'}, {k} shots, seed {seed}: " + ", ".join(told))


def mean_of(found: FewShot) -> float:
    """The plain mean of the first part, for a line of progress."""
    return float(next(iter(found.scores.values())).values["accuracy"].nanmean())


def _takes_adapted(head: Head, texts: Tensor | None) -> bool:
    return head.adapted_use == "yes" or (head.adapted_use == "without text" and texts is None)


def _head(method: str, settings: Settings, encoder: Encoder) -> Head:
    head = HEADS[method]()
    head.set_params(logit_scale=settings.logit_scale or encoder.logit_scale or 100.0)
    if head.hyperparameters:
        head.set_params(policy=settings.policy)
    return head


def _set(head: Head, seed: int, values: Mapping[str, float]) -> Head:
    """A copy with this cell's seed, where training has one, and transferred values."""
    copy: Head = clone(head).set_params(**values)
    if "seed" in copy.get_params():
        copy.set_params(seed=seed)
    return copy


def _transferred(settings: Settings) -> dict[tuple[str, str, int], dict[str, float]]:
    """(adapter, method, K) -> the medians over seeds of what another table chose.

    Raises:
        InputError: it is no such table, or lacks a method at some K.
    """
    if settings.transfer is None:
        return {}
    path = Path(settings.transfer).expanduser() / "results.json"
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
        for cell in cells:
            found.setdefault((cell["adapter"], cell["method"], cell["shots"]), []).append(cell["selection"]["values"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not the table of a few-shot run ({error}); give its folder as transfer=…"
        ) from error
    there = ", ".join(sorted({f"{method} at {k} shots" for _, method, k in found})) or "nothing"
    wanted = [(method, k) for method in settings.methods if HEADS[method].hyperparameters for k in settings.shots]
    if missing := [(method, k) for method, k in wanted if not found.get(("", method, k))]:
        method, k = missing[0]
        raise InputError(f"{settings.transfer} has no {method} at {k} shots to transfer from; it has {there}")
    try:
        return {
            key: {name: float(np.median([v[name] for v in values])) for name in HEADS[key[1]].hyperparameters}
            for key, values in found.items()
            if key[1] in HEADS
        }
    except KeyError as error:
        raise InputError(f"{path} is of another version: its cells lack {error}; make that table again") from error


def _moved(
    transferred: Mapping[tuple[str, str, int], Mapping[str, float]],
    adapter: str,
    method: str,
    k: int,
    settings: Settings,
) -> Mapping[str, float]:
    """What a cell takes from the other table: of its adapter, else of the frozen features."""
    if settings.policy != "transfer":
        return {}
    return transferred.get((adapter, method, k)) or transferred.get(("", method, k), {})


# ----------------------------------------------------------------------------------------------------------- files

DIFFERENCES = (
    "data", "model", "method", "shots", "part", "adapter", "against", "difference", "low", "high", "n", "queries",
)  # fmt: skip
_Key = tuple[str, str, int, str]


def _pooled(cells: Sequence[Cell]) -> dict[_Key, PerQuery]:
    """(adapter, method, K, part) -> one replicate a seed."""
    found: dict[_Key, list[PerQuery]] = {}
    for cell in cells:
        found.setdefault((cell.adapter, cell.method, cell.shots, cell.part), []).append(cell.scores)
    return {
        key: PerQuery({"accuracy": torch.cat([s.values["accuracy"] for s in scores])}, scores[0].units)
        for key, scores in found.items()
    }


def _summary(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    policies: dict[_Key, dict[str, None]] = {}
    seeds: dict[_Key, dict[str, None]] = {}
    for cell in cells:
        key = (cell.adapter, cell.method, cell.shots, cell.part)
        policies.setdefault(key, {})[cell.selection.policy] = None
        seeds.setdefault(key, {})[str(cell.seed)] = None
    rows = []
    for key, scores in _pooled(cells).items():
        adapter, method, k, part = key
        estimate = mean(scores)["accuracy"]
        values = (
            cells[0].names.data, cells[0].names.model, adapter, method, k, "+".join(seeds[key]),
            "+".join(policies[key]), *_numbers(estimate), part, estimate.queries,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _differences(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Adapted less frozen, and method less reference, query by query."""
    pooled = _pooled(cells)
    methods = list(dict.fromkeys(method for _, method, _, _ in pooled))
    reference = next((name for name in ("zero_shot", "nearest_prototype") if name in methods), None)
    rows = []
    for (adapter, method, k, part), scores in pooled.items():
        against = {"frozen": ("", method, k, part)} if adapter else {str(reference): ("", str(reference), k, part)}
        for name, other in against.items():
            if other not in pooled or other == (adapter, method, k, part):
                continue
            difference = paired_difference(pooled[other], scores)["accuracy"]
            values = (
                cells[0].names.data, cells[0].names.model, method, k, part, adapter, name,
                *_numbers(difference), difference.queries,
            )  # fmt: skip
            rows.append(dict(zip(DIFFERENCES, values, strict=True)))
    return rows


def _numbers(estimate: Estimate) -> tuple[float | None, float | None, float | None, int]:
    """Value, low, high, n; None where there is none, as of one class: JSON has no NaN."""
    value, low, high = (
        round(x, 5) if math.isfinite(x) else None for x in (estimate.value, estimate.low, estimate.high)
    )
    return value, low, high, estimate.n


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _lines(summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in summary:
        name = f"{row['method']}{' + ' + row['adapter'] if row['adapter'] else ''}"
        yield (
            f"{row['part']:12} {name:34} {row['shots']:3} shots   {as_number(row['accuracy'])} "
            f"[{as_number(row['low'])}, {as_number(row['high'])}]   {row['n']} classes, {row['queries']:,} queries, "
            f"{row['policy']}"
        )


def _short(model: str) -> str:
    """What a model is called in a table: the last word of its address."""
    return model.partition("@")[0].rstrip("/").rpartition("/")[2]


def _adapter_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].removesuffix(".safetensors")


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            close = get_close_matches(where, Settings.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(Settings.model_fields)}"
            lines.append(f"{where}: unknown key; {hint}")
        else:
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
