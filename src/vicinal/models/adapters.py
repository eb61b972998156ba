"""Ways to adapt an encoder: which weights are trained, and which are added.

    LoRA:         y = W x + b + (alpha / r) B A x      A: "r in", Kaiming-uniform; B: "out r", zero; W, b frozen
    LinearHead:   z = V layer_norm(f) + c              V: "D F", Xavier-uniform; c: zero
    BitFit:       the biases of the tower; Full: all of the tower; LastBlocks: its last blocks and what follows them

`adapt` gives a new encoder, `trainable` what the optimiser needs, `adapter_state` what has to be saved, and `merge` an
encoder of the plain architecture again. `check_adapted` proves before training that nothing is a silent no-op.

Letters: r rank, f feature of the backbone of F numbers, D numbers an embedding, x input of a layer.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vicinal.models.encoder import Encoder, Tower
from vicinal.models.modules import SplitAttention, unprepared
from vicinal.types import InputError

__all__ = [
    "ADAPTERS",
    "BitFit",
    "Full",
    "LastBlocks",
    "LinearHead",
    "LoRA",
    "adapt",
    "adapter_state",
    "adapters_from_config",
    "check_adapted",
    "load_adapter_state",
    "merge",
    "parameter_counts",
    "save_peft",
    "trainable",
]

Which = Literal["image", "text", "both"]


@dataclass(frozen=True, slots=True)
class Full:
    """Train everything in a tower: its blocks, its embeddings, its norms and projections, and the head.

    Args:
        tower: "image", "text" or "both". The scale and bias of an image-text model belong to "both".

    >>> Full().tower
    'image'
    """

    tower: Which = "image"

    def apply(self, encoder: Encoder) -> None:
        """Mark them as trained."""
        _train(_tower_parameters(encoder, self.tower).values(), self, encoder)


@dataclass(frozen=True, slots=True)
class LastBlocks:
    """Train the last `n` blocks of the image tower and all that follows them: final norm, pooling, projection, head.

    Args:
        n: number of blocks, at least 1 and at most as many as there are. The patch embedding, the position embedding
            and the blocks before stay frozen.

    >>> LastBlocks(2).n
    2
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"last_blocks.n is {self.n}; give at least 1 (or `full` for everything)")

    def apply(self, encoder: Encoder) -> None:
        """Mark them as trained."""
        tower = encoder.anatomy.image
        if self.n > len(tower.blocks):
            raise InputError(
                f"last_blocks.n is {self.n}, but {encoder.source} has {len(tower.blocks)} blocks in its image tower"
            )
        names = [*tower.blocks[-self.n :], *([tower.norm] if tower.norm else []), *encoder.anatomy.heads]
        prefixes = tuple(f"{name}." for name in names)
        found = [p for name, p in encoder.model.named_parameters() if name in names or name.startswith(prefixes)]
        _train([*found, *encoder.head.parameters()], self, encoder)


@dataclass(frozen=True, slots=True)
class BitFit:
    """Train the biases of a tower and nothing else. Ben Zaken et al. 2022, arXiv:2106.10199.

    Args:
        tower: "image", "text" or "both".

    >>> BitFit().tower
    'image'
    """

    tower: Which = "image"

    def apply(self, encoder: Encoder) -> None:
        """Mark them as trained."""
        parameters = _tower_parameters(encoder, self.tower).items()
        _train([p for name, p in parameters if p.dim() == 1 and _is_bias(name)], self, encoder)


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Put a new linear layer after the encoder and train it: z = V layer_norm(f) + c.

    The output is a new space: `encode_text` refuses from then on.

    Args:
        dim: D, numbers of an embedding; None keeps the backbone's.
        norm: normalise the feature with a LayerNorm (trained) first.

    >>> LinearHead(dim=512).dim
    512
    """

    dim: int | None = None
    norm: bool = True

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise InputError(f"linear_head.dim is {self.dim}; give at least 1, or leave it out to keep the width")

    def apply(self, encoder: Encoder) -> None:
        """Replace `encoder.head`."""
        width = encoder.embedding_dim
        old = encoder.head
        if not isinstance(old, nn.Identity):  # a second head takes the place of the first
            width = cast(nn.Linear, cast(nn.Sequential, old)[-1]).in_features
        dim = self.dim or width
        linear = nn.Linear(width, dim)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers = [nn.LayerNorm(width), linear] if self.norm else [linear]
        encoder.head = nn.Sequential(*layers).to(encoder.device).train(encoder.training)
        encoder.embedding_dim = dim


@dataclass(frozen=True, slots=True)
class LoRA:
    """Low-rank updates of linear layers: y = W x + b + (alpha / r) B A x. Hu et al. 2021, arXiv:2106.09685.

    B is zero at the start, so the first output is that of the encoder it was made from.

    Args:
        rank: r.
        alpha: scale of the update; None: 2 r, so that the factor alpha / r is 2, whatever the rank.
        dropout: on x, in front of A, while training.
        targets: which layers of each block: "attention" (all its projections), "mlp", or finer: "q", "k", "v", "out"
            where each has a layer of its own, "qkv" for the three.
        first_block: blocks before this one (counted from 0) get none. Blocks that an earlier method trains in full are
            left out too: an update of low rank adds nothing to them.
        tower: "image", "text" or "both".

    >>> LoRA(rank=16, targets=("q", "v")).scale
    2.0
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention", "mlp")
    first_block: int = 0
    tower: Which = "image"

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise InputError(f"lora.targets is one word; give a list: [{self.targets}]")
        object.__setattr__(self, "targets", tuple(self.targets))  # a list is welcome, and would not be hashable
        if self.rank < 1:
            raise InputError(f"lora.rank is {self.rank}; give at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout}; give a share, from 0 up to 1")

    @property
    def scale(self) -> float:
        """Alpha / r, the factor of the update."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank

    def apply(self, encoder: Encoder) -> None:
        """Put peft's layers in the place of the linear layers that the anatomy names."""
        for which in ("image", "text"):
            if self.tower in (which, "both"):
                self._apply(encoder, which)

    def _apply(self, encoder: Encoder, which: Literal["image", "text"]) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        tower = _tower(encoder, which)
        if not 0 <= self.first_block < len(tower.blocks):
            raise InputError(
                f"lora.first_block is {self.first_block}, but the {which} tower of {encoder.source} has "
                f"{len(tower.blocks)} blocks, counted from 0"
            )
        if "fused" in tower.attention and set(self.targets) - {"mlp"}:
            tower = _split_attention(encoder, which)
        layers = _layers(tower, self.targets, encoder.source)
        names = [f"{block}.{layer}" for block in tower.blocks[self.first_block :] for layer in layers]
        modules = dict(encoder.model.named_modules())
        names = [name for name in names if not modules[name].weight.requires_grad]
        if not names:
            raise InputError(
                f"lora matches no frozen layer of the {which} tower: another method trains them all in full"
            )
        if taken := [name for name in names if isinstance(modules[name], LoraLayer)]:
            raise InputError(f"{taken[0]} has a lora already; give one lora for each layer")
        if odd := [name for name in names if not isinstance(modules[name], nn.Linear)]:
            raise InputError(f"lora adapts linear layers; {odd[0]} is {type(modules[odd[0]]).__name__}")

        trained = {id(p) for p in encoder.parameters() if p.requires_grad}
        before = {id(layer) for layer in modules.values() if isinstance(layer, LoraLayer)}
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.scale * self.rank,
            lora_dropout=self.dropout,
            target_modules="|".join(re.escape(name) for name in names),  # matched against the whole dotted name
        )
        inject_adapter_in_model(config, encoder.model)
        del encoder.model.peft_config  # peft's note of one injection; a second one would take it for its own
        modules = dict(encoder.model.named_modules())
        found = {name for name, layer in modules.items() if isinstance(layer, LoraLayer) and id(layer) not in before}
        if found != set(names):
            raise RuntimeError(f"peft adapted {sorted(found ^ set(names))}, which differs from what was asked for")
        for name, layer in modules.items():
            if isinstance(layer, LoraLayer):
                if name in found:
                    layer.lora_A.float()
                    layer.lora_B.float()
                trained |= {id(p) for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters())}
        for parameter in encoder.parameters():  # peft froze what other methods train
            parameter.requires_grad_(id(parameter) in trained)


Method = Full | LastBlocks | LinearHead | BitFit | LoRA

ADAPTERS: dict[str, type[Method]] = {
    "full": Full,
    "last_blocks": LastBlocks,
    "linear_head": LinearHead,
    "bitfit": BitFit,
    "lora": LoRA,
}
"""The name in a recipe -> the class."""


def adapters_from_config(config: Iterable[Mapping[str, Any]]) -> tuple[Method, ...]:
    """The `adapt:` of a recipe as objects.

    Raises:
        InputError: an entry holds not exactly one known name, or a setting that the method does not have.

    >>> adapters_from_config([{"lora": {"rank": 16}}, {"linear_head": {"dim": 512}}])[1]
    LinearHead(dim=512, norm=True)
    """
    methods = []
    for entry in config:
        if len(entry) != 1:
            raise InputError(
                f"each entry of `adapt` is one method with its settings, as {{lora: {{rank: 8}}}}: {entry}"
            )
        ((name, settings),) = entry.items()
        if name not in ADAPTERS:
            raise InputError(
                f"unknown method {name!r} in `adapt`{_nearest(name, ADAPTERS)}; there are {_list(ADAPTERS)}"
            )
        fields = [field.name for field in dataclasses.fields(ADAPTERS[name])]
        for key in settings or {}:
            if key not in fields:
                raise InputError(f"{name} has no setting {key!r}{_nearest(key, fields)}; it has {_list(fields)}")
        try:
            given: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in (settings or {}).items()
            }
            methods.append(ADAPTERS[name](**given))
        except TypeError as error:
            raise InputError(f"{name}: {error}") from error
    return tuple(methods)


def adapt(encoder: Encoder, *methods: Method) -> Encoder:
    """A new encoder to which `methods` are applied in order; all else is frozen. The given one stays as it is.

    What an earlier `adapt` of the same encoder trains stays trained.

    Args:
        encoder: of any family.
        methods: entries of `ADAPTERS`.

    Raises:
        InputError: a method matches no layer of this encoder; the message names those that it has.
    """
    adapted = unprepared(copy.deepcopy(encoder))
    if not encoder.adapters:
        adapted.requires_grad_(False)
    for method in methods:
        method.apply(adapted)
    adapted.adapters = (*encoder.adapters, *methods)
    return adapted


def trainable(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}


def adapter_state(encoder: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that training changes (and of the running statistics of their modules), by name."""
    state = encoder.state_dict()
    return {name: state[name].detach().clone() for name in _state_names(encoder)}


def load_adapter_state(encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put what `adapter_state` gave into an encoder that is adapted in the same way.

    Raises:
        InputError: names or shapes are not those of this encoder.
    """
    names, tensors = _state_names(encoder), encoder.state_dict()
    missing, unknown = sorted(set(names) - set(state)), sorted(set(state) - set(names))
    if missing or unknown:
        raise InputError(
            f"these weights belong to another adaptation: {len(missing)} are missing (as {missing[:1]}), "
            f"{len(unknown)} are unknown here (as {unknown[:1]}); adapt with the recipe they were trained with"
        )
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise InputError(
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(tensors[name].shape)} in the encoder"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            tensors[name].copy_(tensor)


def merge(encoder: Encoder) -> Encoder:
    """A new encoder of the plain architecture: W + (alpha / r) B A in the place of W, attention fused as it was.

    Nothing of it is marked as trained. A LinearHead stays, for it is a layer of its own.
    """
    merged = unprepared(copy.deepcopy(encoder))
    for name, module in list(merged.model.named_modules()):
        if hasattr(module, "lora_A"):  # peft's layers
            _replace(merged.model, name, _merged(module))
    for name, module in list(merged.model.named_modules()):
        if isinstance(module, SplitAttention):
            _replace(merged.model, name, module.fused())
    anatomy = merged.anatomy
    merged.anatomy = dataclasses.replace(
        anatomy, image=_fused_tower(merged, anatomy.image), text=anatomy.text and _fused_tower(merged, anatomy.text)
    )
    merged.adapters = tuple(method for method in merged.adapters if isinstance(method, LinearHead))
    return merged.requires_grad_(False)


def parameter_counts(encoder: Encoder) -> dict[str, int]:
    """How many numbers are trained, how many there are in all, and how many are left to run after `merge`."""
    total = sum(p.numel() for p in encoder.parameters())
    lora = sum(p.numel() for name, p in encoder.named_parameters() if _is_lora(name))
    return {
        "trained": sum(p.numel() for p in trainable(encoder).values()),
        "total": total,
        "inference": total - lora,
    }


def _train(parameters: Iterable[nn.Parameter], method: object, encoder: Encoder) -> None:
    count = 0
    for parameter in parameters:
        parameter.requires_grad_(True)
        count += 1
    if not count:
        raise InputError(f"{method} matches no weight of {encoder.source}, whose anatomy is {encoder.anatomy}")


def _tower(encoder: Encoder, which: Literal["image", "text"]) -> Tower:
    tower = encoder.anatomy.image if which == "image" else encoder.anatomy.text
    if tower is None:
        raise InputError(f"{encoder.source} has no text tower to adapt; use tower: image")
    if not tower.blocks:
        raise InputError(f"the {which} tower of {encoder.source} has no transformer blocks; use linear_head or full")
    return tower


def _tower_parameters(encoder: Encoder, which: Which) -> dict[str, nn.Parameter]:
    """Parameters by name: of the image is what stands under the same child of the model as its blocks or heads do."""
    everything = dict(encoder.named_parameters())
    anatomy = encoder.anatomy
    if which in ("text", "both"):
        _tower(encoder, "text")
    if which == "both" or anatomy.text is None:
        return everything
    named = [*anatomy.image.blocks, anatomy.patch_embed, *anatomy.heads, *filter(None, [anatomy.image.norm])]
    roots = {name.split(".")[0] for name in named}
    image = {n: p for n, p in everything.items() if n.startswith("head.") or n.split(".")[1] in roots}
    if which == "image":
        return image
    scales = ("model.logit_scale", "model.logit_bias")
    return {name: p for name, p in everything.items() if name not in image and name not in scales}


def _is_bias(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last == "bias" or (last.endswith("_bias") and last != "logit_bias")


def _is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _layers(tower: Tower, targets: Sequence[str], source: str) -> list[str]:
    """Words -> dotted names within a block, each once."""
    words: dict[str, tuple[str, ...]] = {}
    if tower.attention:
        words["attention"] = tuple(tower.attention.values())
    if tower.mlp:
        words["mlp"] = tower.mlp
    words |= {role: (name,) for role, name in tower.attention.items()}
    if {"q", "k", "v"} <= set(tower.attention):
        words["qkv"] = tuple(tower.attention[role] for role in "qkv")
    for target in targets:
        if target not in words:
            why = ""
            if target in ("q", "k", "v") and "qkv" in tower.attention:
                why = f"; q, k and v are one layer there, {tower.attention['qkv']}, so take qkv"
            raise InputError(
                f"lora.targets: {source} has no {target!r}{_nearest(target, words)}; it has {_list(words)}{why}"
            )
    if not targets:
        raise InputError(f"lora.targets is empty; choose among {_list(words)}")
    return list(dict.fromkeys(name for target in targets for name in words[target]))


def _split_attention(encoder: Encoder, which: Literal["image", "text"]) -> Tower:
    """Replace every fused attention of a tower, and say so in the anatomy."""
    tower = _tower(encoder, which)
    name = tower.attention["fused"]
    for block in tower.blocks:
        attention = cast(nn.MultiheadAttention, encoder.model.get_submodule(f"{block}.{name}"))
        _replace(encoder.model, f"{block}.{name}", SplitAttention(attention))
    split = dataclasses.replace(tower, attention={role: f"{name}.{role}" for role in ("q", "k", "v", "out")})
    encoder.anatomy = (
        dataclasses.replace(encoder.anatomy, image=split)
        if which == "image"
        else dataclasses.replace(encoder.anatomy, text=split)
    )
    return split


def _fused_tower(encoder: Encoder, tower: Tower) -> Tower:
    """The tower as it was before `_split_attention`, if it was split."""
    parent, _, role = tower.attention.get("q", "").rpartition(".")
    if not tower.blocks or role != "q":
        return tower
    if isinstance(encoder.model.get_submodule(f"{tower.blocks[0]}.{parent}"), nn.MultiheadAttention):
        return dataclasses.replace(tower, attention={"fused": parent})
    return tower


def _merged(layer: nn.Module) -> nn.Linear:
    """The linear layer with the update in its weight, summed in float32."""
    base = cast(nn.Linear, layer.base_layer)
    weight = base.weight.detach().float()
    for name in cast(nn.ModuleDict, layer.lora_A):
        A = cast(nn.Linear, cast(nn.ModuleDict, layer.lora_A)[name]).weight.detach().float()
        B = cast(nn.Linear, cast(nn.ModuleDict, layer.lora_B)[name]).weight.detach().float()
        weight = weight + cast(Mapping[str, float], layer.scaling)[name] * (B @ A)
    base.weight = nn.Parameter(weight.to(base.weight.dtype))
    return base


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _state_names(encoder: nn.Module) -> list[str]:
    names = list(trainable(encoder))
    for prefix, module in encoder.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            buffers = [f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)]
            names += [name for name in buffers if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set]
    return names


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_adapted(encoder: Encoder, images: Float[Tensor, "B 3 H W"]) -> None:
    """Prove on a few images, before training, that what is adapted is alive; else raise. All is left as it was.

    1. After one backward pass of a random projection f of the embeddings, every zero-initialised factor (LoRA's B) has
       a gradient, and so has every block of which something is trained.
    2. All factors are moved at once, each along its gradient by the step that should raise f by c, forwards and
       backwards: with J factors alive the central difference of f is J c, and each dead one lowers it by c. Within
       c / 4 of J c all are alive. Else (a dead one, or a strongly curved f) each is moved on its own, and must change
       the embedding of the first image.

    Weights, gradients, modes and random state come back bit for bit. A text tower is run on a text, where something of
    it is trained.

    Args:
        encoder: adapted.
        images: two are enough.

    Raises:
        InputError: something is trained that does not reach the embeddings; the message names the layer.
    """
    trained = trainable(encoder)
    if not trained:
        raise InputError("nothing is trained: give `adapt` a method, such as lora")
    factors = {name: p for name, p in trained.items() if ".lora_B." in name}
    of_text = set(_tower_parameters(encoder, "text")) if encoder.anatomy.text is not None else set()
    weights = {name: p.detach().clone() for name, p in factors.items()}
    gradients = {name: p.grad for name, p in trained.items()}
    modes = {module: module.training for module in encoder.modules()}
    images = images.to(encoder.device)
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    generator = torch.Generator().manual_seed(0)

    def outputs(images: Tensor) -> list[Tensor]:
        towers = []
        if set(trained) - of_text:
            towers.append(encoder.encode_image(images))
        if set(trained) & of_text:
            towers.append(encoder.encode_text(["a photo of a bird"]))
        return [output.float() for output in towers]

    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            encoder.eval()
            for parameter in trained.values():
                parameter.grad = None
            found = outputs(images)
            directions = [torch.randn(z.shape, generator=generator).to(z.device) / z.numel() ** 0.5 for z in found]
            torch.autograd.backward(_project(found, directions))
            _check_gradients(encoder, trained, factors)
            if factors:
                c = 1e-4 * sum(float(z.detach().square().mean().sqrt()) for z in found)
                _check_response(factors, weights, outputs, images, directions, c)
        finally:
            _restore(factors, weights)
            for name, parameter in trained.items():
                parameter.grad = gradients[name]
            for module, mode in modes.items():
                module.training = mode


def _check_gradients(
    encoder: Encoder, trained: Mapping[str, nn.Parameter], factors: Mapping[str, nn.Parameter]
) -> None:
    alive = {name for name, p in trained.items() if p.grad is not None and bool(p.grad.isfinite().all() & p.grad.any())}
    for name in factors:
        if name not in alive:
            raise InputError(f"{_layer(name)} was adapted, but its update gets no gradient: leave it out of `targets`")
    towers = (encoder.anatomy.image, encoder.anatomy.text)
    for block in (f"model.{block}." for tower in towers if tower is not None for block in tower.blocks):
        own = {name for name in trained if name.startswith(block)}
        if own and not own & alive:
            raise InputError(f"{block.strip('.')} is trained, but gets no gradient: it does not reach the embedding")
    if not alive:
        raise InputError(f"{next(iter(trained))} and all else that is trained gets no gradient")


@torch.no_grad()
def _check_response(
    factors: Mapping[str, nn.Parameter],
    weights: Mapping[str, Tensor],
    outputs: Callable[[Tensor], list[Tensor]],
    images: Tensor,
    directions: Sequence[Tensor],
    c: float,
) -> None:
    gradients = {name: cast(Tensor, p.grad) for name, p in factors.items()}
    steps = {name: c * gradient / gradient.square().sum() for name, gradient in gradients.items()}
    values = []
    for sign in (1, -1):
        for name, parameter in factors.items():
            parameter.copy_(weights[name] + sign * steps[name])
        values.append(float(_project(outputs(images), directions)))
    if abs((values[0] - values[1]) / 2 - len(factors) * c) < c / 4:
        return
    _restore(factors, weights)
    before = outputs(images[:1])
    for name, parameter in factors.items():
        parameter.add_(100 * steps[name])
        if all(torch.equal(old, new) for old, new in zip(before, outputs(images[:1]), strict=True)):
            raise InputError(f"{_layer(name)} was adapted, but its update changes nothing: leave it out of `targets`")
        parameter.copy_(weights[name])


def _project(outputs: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    return torch.stack([(z * d).sum() for z, d in zip(outputs, directions, strict=True)]).sum()


@torch.no_grad()
def _restore(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _layer(name: str) -> str:
    return name.removeprefix("model.").partition(".lora_")[0]


def save_peft(encoder: Encoder, folder: str | Path) -> Path:
    """Write the low-rank updates alone, in peft's layout: adapter_config.json and adapter_model.safetensors.

    `peft.PeftModel.from_pretrained(model, folder)` puts them on the plain timm or transformers model (or on the MLPs of
    an open_clip one).

    Args:
        encoder: adapted by `LoRA` alone, once or more.
        folder: made if it is not there.

    Raises:
        InputError: the layout cannot hold it: another method is among the adapters, several LoRA differ in dropout, or
            the layers are those of a split attention, which the plain model does not have.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    other = [method for method in encoder.adapters if not isinstance(method, LoRA)]
    if other or not encoder.adapters:
        raise InputError(
            f"peft's layout holds lora alone, here is {other or 'no adapter'}; save `merge(encoder)` instead"
        )
    if len({method.dropout for method in encoder.adapters}) > 1:
        raise InputError("peft's layout holds one dropout for all layers; save `merge(encoder)` instead")
    model = encoder.model
    if any(isinstance(module, SplitAttention) for module in model.modules()):
        raise InputError(
            "the attention of open_clip is one fused layer in the plain model, so peft has no place for updates of its "
            "parts; save `merge(encoder)` instead, or adapt with targets: [mlp]"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    ranks = {name: next(iter(layer.r.values())) for name, layer in layers.items()}
    alphas = {name: next(iter(layer.lora_alpha.values())) for name, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    names: list[str] | str = list(layers)
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) for name, _ in model.named_modules()):  # peft takes a list as suffixes
        names = "|".join(re.escape(name) for name in names)
    config = LoraConfig(
        base_model_name_or_path=encoder.source,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=encoder.adapters[0].dropout,
        target_modules=names,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            (linear,) = getattr(layer, part).values()
            tensors[f"base_model.model.{name}.{part}.weight"] = linear.weight.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
