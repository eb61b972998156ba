"""YAML <-> a frozen, validated Recipe: what a run does, whole, and nothing besides.

A recipe says only what differs from the defaults. Keys of which one is chosen (`data`, `split`, `loss`, `sampler`, an
entry of `adapt`) hold a mapping of that one name to its settings: `loss: {arcface: {margin: 0.3}}`. The settings of
losses and adapters are read off their own classes, so a part is described in one place.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_type_hints
from urllib.parse import urlsplit

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from vicinal.data.glyphs import Portion
from vicinal.data.manifest import Manifest
from vicinal.data.transforms import AUGMENT
from vicinal.evaluation.image_text import Protocol
from vicinal.losses import CONTRASTIVE_LOSSES, LINEAR_LOSSES, PAIR_LOSSES, PROXY_LOSSES
from vicinal.models.adapters import ADAPTERS, VisualPrompt
from vicinal.models.text_tower import TextTower
from vicinal.training.semantic_proxies import ACCUMULATORS
from vicinal.types import InputError

__all__ = ["Data", "Recipe", "Split", "apply_override", "json_schema", "starter"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class _OneOf(_Strict):
    """A mapping with exactly one of its keys given; `chosen` is that key and its value."""

    @model_validator(mode="after")
    def _exactly_one(self) -> _OneOf:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            choices = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one of {choices}; found {', '.join(given) or 'none'}")
        return self

    @property
    def chosen(self) -> tuple[str, Any]:
        return next((name, value) for name in type(self).model_fields if (value := getattr(self, name)) is not None)


def _settings(part: type, name: str) -> type[BaseModel]:
    """The keyword settings of a loss or an adapter as a strict model, read off its constructor."""
    hints = get_type_hints(part if dataclasses.is_dataclass(part) else vars(part)["__init__"])
    parameters = list(inspect.signature(part).parameters.values())
    # what the model and the data give
    derived = set() if dataclasses.is_dataclass(part) else {"dim", "classes"}
    if part in CONTRASTIVE_LOSSES.values():
        derived = {"scale", "bias"}
    fields: dict[str, Any] = {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in parameters if p.name not in derived
    }
    given = {p.name: 1 for p in parameters if p.name in derived & {"dim", "classes"}}

    def made(settings: BaseModel) -> BaseModel:
        """A value out of its range is said by the part itself, here already."""
        with torch.random.fork_rng(devices=[]):
            part(**given, **{key: getattr(settings, key) for key in fields})
        return settings

    validators: dict[str, Any] = {"made": model_validator(mode="after")(made)}
    return create_model(name, __base__=_Strict, __validators__=validators, **fields)


def _one_of(name: str, table: Mapping[str, type]) -> type[_OneOf]:
    fields: dict[str, Any] = {key: (_settings(part, part.__name__) | None, None) for key, part in table.items()}
    return create_model(name, __base__=_OneOf, **fields)


class TrainValTest(_Strict):
    """Separate files for the parts of a data set; labels are those of all files together."""

    train: str | None = None
    val: str | None = None
    test: str | None = None


class Shards(_Strict):
    """Tars of images and captions, by patterns such as `train_{000000..000260}.tar`: see `read_shards`.

    `train_eval` and `val_eval` name the shards that are looked at while training. Addresses of `train` are streamed,
    files with `stream: true`: read as they come, never indexed (see `vicinal.data.stream`). The loss then starts from
    `train_eval`, what cannot be used is always left out and counted, and `shuffle` is the number of samples in each
    worker's buffer; true: 5000, false: shards and samples in their order. Files that are indexed are shuffled whole.
    """

    train: str | list[str] | None = None
    val: str | list[str] | None = None
    test: str | list[str] | None = None
    train_eval: str | list[str] | None = None
    val_eval: str | list[str] | None = None
    stream: bool | None = None
    shuffle: bool | Annotated[int, Field(ge=1)] = True

    @property
    def streamed(self) -> str | list[str] | None:
        """The shards that are trained on as they come; None where all are indexed."""
        named = [self.train] if isinstance(self.train, str) else self.train or []
        addresses = any(urlsplit(shard).scheme in ("http", "https") for shard in named)
        return self.train if (addresses if self.stream is None else self.stream) else None

    @model_validator(mode="after")
    def _read_one_way(self) -> Shards:
        if self.streamed is None and self.shuffle is False:
            raise ValueError("shuffle: false is for shards that are streamed; indexed ones are shuffled whole")
        if self.stream and self.train is None:
            raise ValueError("stream: there are no shards of train to stream")
        if self.streamed is not None and self.train_eval is None:
            raise ValueError(
                "train_eval: name a few of the shards of train, too: those that are streamed cannot be looked at, and "
                "the loss starts from some of them"
            )
        return self


class Benchmark(_Strict):
    """A published data set by name, below `root`."""

    name: str
    root: str = "~/data"
    download: bool = False


class Glyphs(_Strict):
    """The built-in data set, drawn and not downloaded: see `load_glyphs`, whose arguments these are."""

    size: Annotated[int, Field(ge=16, le=512)] = 48
    families: list[str] | None = None
    characters: str | list[str] | None = None
    images_per_face: Annotated[int, Field(ge=1, le=1000)] = 1
    test_families: list[str] = []
    portion: Portion = "all"
    variation: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: int = 0


class OpenImages(_Strict):
    """Pictures of a folder by a CSV of ImageID, DisplayName and type: see `read_open_images`."""

    root: str
    csv: str


class Data(_Strict):
    """Where the images are: exactly one source, by the name of its reader; several such under `together`.

    `columns` maps the names vicinal uses (image, label, text, box, group, split) to those of a table. `padding` widens
    each box by this share of its longer side. `on_error: skip` leaves unreadable images out, counted and listed.
    `leaks: drop` leaves pictures out of the training that are measured too (the same pixels in another row); else they
    are an error. `min_images` leaves smaller classes out.
    `labels: false` reads a folder of images, or a table without labels, to train on images alone.
    """

    folder: str | TrainValTest | None = None
    table: str | TrainValTest | None = None
    coco: str | TrainValTest | None = None
    voc: str | TrainValTest | None = None
    shards: str | list[str] | Shards | None = None
    hub: str | TrainValTest | None = None
    benchmark: Benchmark | None = None
    glyphs: Glyphs | None = None
    open_images: OpenImages | None = None
    together: Annotated[list[Data], Field(min_length=1)] | None = None
    columns: dict[str, str] = {}
    root: str | None = None
    padding: Annotated[float, Field(ge=0)] = 0.0
    min_images: Annotated[int, Field(ge=1)] = 1
    on_error: Literal["raise", "skip"] = "raise"
    leaks: Literal["raise", "drop"] = "raise"
    labels: bool = True

    @model_validator(mode="after")
    def _exactly_one(self) -> Data:
        given = [name for name in ONE_OF["data"] if getattr(self, name) is not None]
        if len(given) != 1:
            choices = ", ".join(ONE_OF["data"])
            raise ValueError(f"give exactly one of {choices}; found {', '.join(given) or 'none'}")
        mapped = {"hub": {"columns"}, "shards": {"columns"}}
        read = ({"table": {"columns", "root"}, "coco": {"root"}} | mapped).get(given[0], set())
        for key in ("columns", "root"):
            if getattr(self, key) and key not in read:
                raise ValueError(f"{key} has no meaning for data.{given[0]}; leave it out")
        if not self.labels and given[0] not in ("folder", "table"):
            raise ValueError(f"labels: false has no meaning for data.{given[0]}; it reads a folder or a table")
        return self

    @property
    def streamed(self) -> str | list[str] | None:
        """The shards that are trained on as they come, if there are any."""
        return self.shards.streamed if isinstance(self.shards, Shards) else None

    @property
    def source(self) -> tuple[str, Any]:
        """The chosen source's name and its value."""
        return next((name, value) for name in ONE_OF["data"] if (value := getattr(self, name)) is not None)


class Captions(_Strict):
    """Which captions of an item count, where it has several: `text` is the first, those of `captions` follow.

    `trained: any` draws one at each look; `measured: all` lets every one ask, and be found.
    """

    trained: Literal["any", "first"] = "any"
    measured: Literal["first", "all"] = "first"


class Probe(_Strict):
    """What the model knows already and should not forget: images with labels, recognised by name before and after.

    `part` takes the rows of one part where the data has a `split` column. None of its images may be trained on.
    """

    data: Data
    part: Literal["train", "val", "test"] | None = None
    templates: Annotated[list[str], Field(min_length=1)] = ["{}"]


class ClassDisjoint(_Strict):
    """Some classes are never seen in training. The only honest test of a model for classes that come later.

    Args:
        holdout: the share of classes that are never seen.
        seed: of the shuffle of the sorted classes.
        val: the share of the remaining classes kept back to select on (checkpoint, interpolation); not trained on.
        seen: the share of each trained class's images kept back to measure seen classes, where the data has no `split`
            column that says so; classes of under five images keep none back.
    """

    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 42
    val: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seen: Annotated[float, Field(ge=0, lt=1)] = 0.2


class Official(_Strict):
    """The parts that the data's own `split` column names.

    `val`, `seed`: where that names nothing to select on and no trained class is measured (cub200, sop, inshop, …), this
    share of the trained classes is kept back for it, as in `class_disjoint`.
    """

    val: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seed: int = 42


class Grouped(_Strict):
    """Whole groups (a contributor, a shop) are held out: `column` is never on both sides."""

    column: str = "group"
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    val: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seed: int = 42


class All(_Strict):
    """Everything is trained on, and nothing of it measured: a generic set. What is measured stands in `elsewhere`."""


class Split(_OneOf):
    """How the data is divided into training, validation and test."""

    class_disjoint: ClassDisjoint | None = None
    official: Official | None = None
    grouped: Grouped | None = None
    all: All | None = None


class Shuffle(_Strict):
    """Every image once an epoch, in a seeded order."""

    batch_size: Annotated[int, Field(ge=2)] = 64


class PK(_Strict):
    """P classes a batch, K images of each: what pair losses need."""

    classes: Annotated[int, Field(ge=2)] = 16
    images_per_class: Annotated[int, Field(ge=1)] = 4


class HardClass(PK):
    """As `pk`, but of classes that are near to each other before training: a class and its nearest `neighbours`."""

    neighbours: Annotated[int, Field(ge=1)] = 64


class NoDuplicate(_Strict):
    """Every image once an epoch, and no two that are alike in one batch: of one caption, or label, or group.

    `by` names what makes two alike. Captions: any that both have, drawn or not.
    """

    batch_size: Annotated[int, Field(ge=2)] = 64
    by: Annotated[list[Literal["text", "label", "group"]], Field(min_length=1)] = ["text", "label"]


class Sampler(_OneOf):
    """Which images stand together in a batch."""

    shuffle: Shuffle | None = None
    no_duplicate: NoDuplicate | None = None
    pk: PK | None = None
    hard_class: HardClass | None = None


class PreprocessChange(_Strict):
    """What to change of the backbone's own preprocessing."""

    size: int | tuple[int, int] | None = None
    crop: Literal["crop", "pad", "squash"] | None = None


if TYPE_CHECKING:  # built from the tables below, which a type checker does not run
    Loss: TypeAlias = _OneOf
    Adapter: TypeAlias = _OneOf
    NewTextTower: TypeAlias = _Strict
else:
    Accumulator = _one_of("Accumulator", ACCUMULATORS)
    NewTextTower = _settings(TextTower, "NewTextTower")
    ClassPrompts = _settings(VisualPrompt, "ClassPrompts")

    class SemanticProxies(_Strict):
        """Proxies made of images and of prompts of their classes: see `vicinal.training.semantic_proxies`.

        `lr` is that of the class prompts, whose steps are Adam's; by default the recipe's. `on_disk` keeps them in a
        memory-mapped file of the run folder, of which checkpoints keep copies.
        """

        prompts: ClassPrompts = ClassPrompts(tokens=3)
        accumulator: Accumulator = Field(default_factory=lambda: Accumulator.model_validate({"gru": {}}))
        lr: Annotated[float, Field(gt=0)] | None = None
        share: Annotated[float, Field(ge=0, le=1)] = 0.5
        margin: Annotated[float, Field(ge=0, lt=2)] = 0.1
        alpha: Annotated[float, Field(gt=0)] = 32.0
        on_disk: bool = False
        max_bytes: Annotated[int, Field(ge=1)] = 2**31

    def _weighted(part: type, name: str) -> type[BaseModel]:
        return create_model(name, __base__=_settings(part, name), weight=(Annotated[float, Field(gt=0)], 1.0))

    class _SomeOf(_Strict):
        @model_validator(mode="after")
        def _at_least_one(self) -> _SomeOf:
            if not self.parts():
                raise ValueError(f"give some of {', '.join(type(self).model_fields)}, each with its weight")
            return self

        def parts(self) -> dict[str, BaseModel]:
            return {n: part for n in type(self).model_fields if (part := getattr(self, n)) is not None}

    Sum = create_model(
        "Sum",
        __base__=_SomeOf,
        __doc__="Pair losses added up, each times its `weight`: see `vicinal.losses.WeightedSum`.",
        **{n: (_weighted(part, f"Weighted{part.__name__}") | None, None) for n, part in PAIR_LOSSES.items()},
    )

    class Dino(_Strict):
        """Self-distillation without labels: see `vicinal.training.distillation` and `multi_crop`.

        `temperature_warmup` is the share of the steps over which the teacher's temperature goes from
        `first_temperature` to `teacher_temperature`. The overlap adapter: 65,536 prototypes, train_head false,
        momentum .9998, 10 small crops, large_scale [.25, 1], small_scale [.05, .25].
        """

        prototypes: Annotated[int, Field(ge=2)] = 4096
        hidden: Annotated[int, Field(ge=1)] = 2048
        bottleneck: Annotated[int, Field(ge=1)] = 256
        train_head: bool = True
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
        teacher_temperature: Annotated[float, Field(gt=0)] = 0.07
        first_temperature: Annotated[float, Field(gt=0)] = 0.04
        temperature_warmup: Annotated[float, Field(ge=0, le=1)] = 0.3
        student_temperature: Annotated[float, Field(gt=0)] = 0.1
        centre_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
        large_scale: tuple[float, float] = (0.4, 1.0)
        small_scale: tuple[float, float] = (0.05, 0.4)
        small_crops: Annotated[int, Field(ge=0)] = 8
        small_size: int | None = None

    Loss = create_model(
        "Loss",
        __base__=_one_of("Loss", PROXY_LOSSES | LINEAR_LOSSES | PAIR_LOSSES | CONTRASTIVE_LOSSES),
        sum=(Sum | None, None),
        semantic_proxies=(SemanticProxies | None, None),
        dino=(Dino | None, None),
    )
    Adapter = _one_of("Adapter", ADAPTERS)

ONE_OF: dict[str, tuple[str, ...]] = {
    "data": ("folder", "table", "coco", "voc", "shards", "hub", "benchmark", "glyphs", "open_images", "together"),
    "split": tuple(Split.model_fields),
    "sampler": tuple(Sampler.model_fields),
    "loss": tuple(Loss.model_fields),
    "adapt": tuple(Adapter.model_fields),
}


class Recipe(_Strict):
    """All of a run. See `docs/all-of-vicinal.md` for each key; every default stands here and nowhere else.

    >>> recipe = Recipe.parse({"data": {"folder": "~/products"}, "model": "timm:vit_tiny_patch16_224"})
    >>> recipe.split.chosen[0], recipe.loss.chosen[0], recipe.seed
    ('class_disjoint', 'arcface', 42)
    """

    data: Data
    elsewhere: dict[str, Data] = {}
    split: Split = Split(class_disjoint=ClassDisjoint())
    model: str
    preprocess: PreprocessChange = PreprocessChange()
    random_init: bool = False
    text_tower: NewTextTower | None = None
    cache_dir: str | None = None
    adapt: list[Adapter] = Field(default_factory=lambda: [Adapter.model_validate({"lora": {}})], min_length=1)
    loss: Loss = Field(default_factory=lambda: Loss.model_validate({"arcface": {"margin": 0.3, "scale": 20.0}}))
    class_means: bool = True
    memory: Annotated[int, Field(ge=1)] | None = None
    sampler: Sampler = Sampler(shuffle=Shuffle())
    augment: str = "light"

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    loss_lr: Annotated[float, Field(gt=0)] | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    final_weight_decay: Annotated[float, Field(ge=0)] | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    clip_each: Annotated[float, Field(gt=0)] | None = None
    accumulate: Annotated[int, Field(ge=1)] = 1
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    retention: Annotated[float, Field(ge=0)] = 0.0
    probe: Probe | None = None
    wise_ft: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    evaluate_every: Annotated[int, Field(ge=1)] | Literal["epoch"] | None = None
    monitor: str = "map@r"
    patience: Annotated[int, Field(ge=1)] | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[int, Field(ge=1)] = 1
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]

    shots: list[Annotated[int, Field(ge=1)]] = [1, 3, 10]
    draws: Annotated[int, Field(ge=1)] = 20
    recall_at: list[Annotated[int, Field(ge=1)]] = [1, 5, 10]
    also: list[Literal["map@r_legacy", "nmi"]] = []
    templates: Annotated[list[str], Field(min_length=1)] = ["{}"]
    captions: Captions = Captions()
    protocols: Annotated[list[Protocol], Field(min_length=1)] = ["full"]
    kinds: str | None = None

    seed: int = 42
    seeds: Annotated[int, Field(ge=1)] = 1
    device: str = "auto"
    workers: Annotated[int, Field(ge=0)] | None = None
    embed_batch_size: Annotated[int, Field(ge=1)] = 128
    cache: str | None = "auto"

    @model_validator(mode="before")
    @classmethod
    def _watched(cls, content: Any) -> Any:  # noqa: ANN401  what a validator gets
        """Images and texts are selected on by captions that find images; `full`, the protocol, may be left out."""
        loss = content.get("loss") if isinstance(content, Mapping) else None
        if not isinstance(loss, Mapping) or not CONTRASTIVE_LOSSES.keys() & loss.keys():
            return content
        ks = content.get("recall_at") or cls.model_fields["recall_at"].default
        monitor = content.get("monitor", f"text_to_image_recall@{max(ks)}")
        return {**content, "monitor": f"full/{monitor}" if "_to_" in monitor and "/" not in monitor else monitor}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.augment not in AUGMENT:
            raise ValueError(f"augment: {self.augment!r} is unknown{_nearest(self.augment, list(AUGMENT))}")
        if self.data.streamed is not None:
            if self.loss.chosen[0] not in CONTRASTIVE_LOSSES:
                raise ValueError(
                    f"loss.{self.loss.chosen[0]} needs to know all classes, which streamed shards do not tell; use "
                    "infonce or siglip, or data.shards.stream: false"
                )
            if self.sampler.shuffle is None:
                raise ValueError("sampler: streamed shards come as they are: sampler: {shuffle: {batch_size: 256}}")
            if self.split.official is None:
                raise ValueError("split: streamed shards are divided by file: split: {official: {}}")
        monitors = ["map@r", "r_precision", *(f"recall@{k}" for k in self.recall_at), "gap", "f1"]
        if self.loss.chosen[0] in CONTRASTIVE_LOSSES:
            words = [*(f"recall@{k}" for k in self.recall_at), "mrr"]
            monitors += [f"full/{way}_{word}" for way in ("text_to_image", "image_to_text") for word in words]
            monitors.append("full/mean_recall")
        if self.monitor not in monitors:
            raise ValueError(
                f"monitor: {self.monitor!r} is not measured on validation{_nearest(self.monitor, monitors)}"
            )
        several = self.sampler.pk or self.sampler.hard_class
        pairs = (*PAIR_LOSSES, "sum")
        if self.loss.chosen[0] in pairs and (several is None or several.images_per_class < 2):
            raise ValueError(
                f"loss.{self.loss.chosen[0]} compares images of one class in a batch, so it needs "
                "sampler: {pk: {classes: 16, images_per_class: 4}}"
            )
        kept = [name for name in ("visual_prompt", "bottleneck") if name in (a.chosen[0] for a in self.adapt)]
        if self.wise_ft is not None and kept:
            raise ValueError(f"wise_ft mixes weights that both models have, and {kept[0]} adds new ones; leave one out")
        if self.retention and self.loss.chosen[0] in ("semantic_proxies", "dino"):
            raise ValueError(f"retention: {self.loss.chosen[0]} has none; leave it out")
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr is {self.final_lr}, above lr, which is {self.lr}; a rate only falls")
        taken = sorted(set(self.elsewhere) & {"seen", "unseen", "joint", "all"})
        if taken:
            raise ValueError(f"elsewhere: {taken[0]!r} is the name of a part of the data itself; choose another")
        if self.split.all is not None and not self.elsewhere:
            raise ValueError(
                "split: all trains on everything, so nothing would be measured; name other data: "
                "elsewhere: {mine: {folder: ~/products}}"
            )
        if not self.data.labels and (self.split.all is None or self.loss.chosen[0] != "dino"):
            raise ValueError("data.labels: false needs split: {all: {}} and loss: {dino: {}}, which need no labels")
        if self.loss.chosen[0] in CONTRASTIVE_LOSSES and any(a.chosen[0] == "linear_head" for a in self.adapt):
            raise ValueError(f"loss.{self.loss.chosen[0]}: a linear_head moves images away from texts; leave it out")
        if self.probe is not None and any(a.chosen[0] == "linear_head" for a in self.adapt):
            raise ValueError(
                "probe: a linear_head moves images away from the names they are recognised by; leave it out"
            )
        templates = [*self.templates, *(self.probe.templates if self.probe else [])]
        if wrong := next((template for template in templates if template.count("{}") != 1), None):
            raise ValueError(f"templates: write {{}} once where the class name goes, not as in {wrong!r}")
        if self.memory is not None and self.loss.chosen[0] not in pairs:
            raise ValueError(f"memory: only a pair loss remembers items ({', '.join(pairs)}); leave it out")
        if self.wise_ft == "auto" and self.split.class_disjoint and not self.split.class_disjoint.val:
            raise ValueError("wise_ft: auto chooses on validation classes; set split.class_disjoint.val above 0")
        return self

    @classmethod
    def parse(cls, content: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
        """A recipe from a mapping.

        Raises:
            InputError: a key is unknown (the nearest known one is named), or a value is not what the key takes.
        """
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            raise InputError(_explain(error, name)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """A recipe from a YAML file and `key=value` overrides.

        Overriding a one-of key (`data.table=…`) replaces the alternative that the file chose.

        Raises:
            InputError: the file is missing or not YAML, or the recipe is wrong.
        """
        path = Path(path).expanduser()
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise InputError(f"the recipe {path} cannot be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise InputError(f"the recipe {path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"the recipe {path} must be a mapping of keys; it is a {type(content).__name__}")
        for override in overrides:
            apply_override(content, override)
        return cls.parse(content, name=str(path))

    def to_yaml(self) -> str:
        """The resolved recipe: every key with its value, defaults included; `load` reads it back to an equal recipe."""
        content = json.loads(self.model_dump_json())
        return yaml.safe_dump(_without_unchosen(content), sort_keys=False, allow_unicode=True, width=120)


def starter(
    kind: str, source: str | Path, manifest: Manifest, model: str, columns: Mapping[str, str] | None = None
) -> str:
    """A commented recipe for the data that was found: what it holds decides the split and the sampler.

    >>> import pyarrow as pa
    >>> rows = {"image": ["a.png", "b.png"], "label": ["x", "y"], "split": ["train", "test"]}
    >>> text = starter("table", "t.csv", Manifest.build(pa.table(rows), "."), "timm:vit_tiny_patch16_224")
    >>> print(text.splitlines()[0])
    # 2 images of 2 classes, 1.0 images a class on average; columns: image, label, split
    """
    images, classes = len(manifest), len(manifest.classes)
    mapped = f", columns: {json.dumps(dict(columns))}" if columns else ""
    holdout = 0.2 if classes >= 5 else 0.5
    lines = [
        f"# {images:,} images of {classes:,} classes, {images / max(1, classes):.1f} images a class on average; "
        f"columns: {', '.join(manifest.names())}",
        f"data:    {{{kind}: {json.dumps(str(source))}{mapped}}}",
        f"split:   {{class_disjoint: {{holdout: {holdout}, seed: 42}}}}      # this share of the classes is never seen",
        f"model:   {model}",
        "adapt:   [{lora: {rank: 8}}]",
        "loss:    {arcface: {margin: 0.3, scale: 20}}",
        "sampler: {shuffle: {batch_size: 64}}",
        "epochs:  12                                             # or steps: 1000",
        "",
    ]
    if "split" in manifest.names():
        lines.insert(3, "#        {official: {}} instead: train, val and test as the `split` column says")
    if "group" in manifest.names():
        lines.insert(3, "#        {grouped: {column: group}} instead: no group on both sides")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors that complete and check YAML.

    >>> json_schema()["required"]
    ['data', 'model']
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in a recipe's mapping, in place; the value is read as YAML.

    >>> content = {"loss": {"arcface": {"margin": 0.3}}, "adapt": [{"lora": {}}]}
    >>> apply_override(content, "loss.cosface.margin=0.2"); apply_override(content, "adapt.0.lora.rank=4")
    >>> content
    {'loss': {'cosface': {'margin': 0.2}}, 'adapt': [{'lora': {'rank': 4}}]}
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override!r} is not an override; write key=value, for instance steps=2000")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise InputError(f"the value of {key} is not YAML: {error}") from error
    value = _number(value)
    path = key.split(".")
    here: Any = content
    for depth, name in enumerate(path):
        last = depth == len(path) - 1
        alternatives = _alternatives(path, depth)
        if isinstance(here, dict):
            if name in alternatives:
                for other in alternatives:
                    if other != name:
                        here.pop(other, None)
            if last:
                here[name] = value
            elif here.get(name) is None:
                here[name] = [] if path[depth + 1].isdigit() else {}
            here = here[name]
        elif isinstance(here, list):
            here = _list_item(here, name, key, value if last else None)
        else:
            raise InputError(f"{key}: {'.'.join(path[:depth])} holds no keys")


def _alternatives(path: Sequence[str], depth: int) -> tuple[str, ...]:
    """The keys of which one is chosen at this place of an override."""
    if path[0] == "elsewhere" or path[:2] == ["data", "together"]:
        here = 2 if path[0] == "elsewhere" else 3
        return ONE_OF["data"] if depth == here else ()
    return ONE_OF.get(path[0], ()) if depth == (2 if path[0] == "adapt" else 1) else ()


def _list_item(items: list[Any], name: str, key: str, value: Any) -> Any:  # noqa: ANN401  a YAML value
    if not name.isdigit() or int(name) > len(items):
        raise InputError(f"{key}: write a position from 0 to {len(items)} instead of {name!r}")
    if int(name) == len(items):
        items.append({})
    if value is not None:
        items[int(name)] = value
    return items[int(name)]


def _number(value: Any) -> Any:  # noqa: ANN401  a YAML value
    """YAML 1.1 reads 1e-3 as text; a person who types it means the number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[:1] in "0123456789.-+" else value
        except ValueError:
            return value
    return value


def _without_unchosen(content: Any) -> Any:  # noqa: ANN401  a YAML value
    """Drop the empty alternatives of one-of mappings, which would read as chosen."""
    content = {key: value for key, value in content.items() if key != "adapt"} | {
        "adapt": [{k: v for k, v in adapter.items() if v is not None} for adapter in content["adapt"]]
    }
    for key in ("split", "sampler", "loss"):
        content[key] = {k: v for k, v in content[key].items() if v is not None or k not in ONE_OF[key]}
    content["data"] = _chosen_data(content["data"])
    content["elsewhere"] = {name: _chosen_data(data) for name, data in content["elsewhere"].items()}
    if content["probe"] is not None:
        content["probe"]["data"] = _chosen_data(content["probe"]["data"])
    return {key: content[key] for key in Recipe.model_fields}


def _chosen_data(data: dict[str, Any]) -> dict[str, Any]:
    chosen = {k: v for k, v in data.items() if v is not None or k not in ONE_OF["data"]}
    return chosen | {k: [_chosen_data(one) for one in v] for k, v in chosen.items() if k == "together"}


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _explain(error: ValidationError, name: str) -> str:
    """One line for each mistake: where, what, and the nearest known key."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if not str(part).endswith("]"))
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            lines.append(f"{where}: unknown key{_nearest(str(problem['loc'][-1]), known)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: is required")
        else:
            lines.append(f"{where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}")
    return f"{name}: " + "\n  ".join(dict.fromkeys(lines))


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at this place of the recipe takes."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401  a type expression
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    arguments = annotation.__args__ if hasattr(annotation, "__args__") else ()  # a plain type has no arguments
    return next((found for argument in arguments if (found := _model_in(argument))), None)
