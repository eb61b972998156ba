"""Adapted encoders: made, trained, saved, merged, counted, and proved alive. The methods are in `models/methods.py`.

`adapt` gives a new encoder, `trainable` what the optimiser needs, `adapter_state` what has to be saved, and `merge` an
encoder with as few layers of its own as it needs. `check_adapted` proves before training that nothing is a silent
no-op.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vicinal.models.encoder import Encoder, Tower
from vicinal.models.methods import (
    ADAPTERS,
    LASTING,
    BitFit,
    Bottleneck,
    Full,
    LastBlocks,
    LinearHead,
    LoRA,
    Method,
    VisualPrompt,
    listed,
    nearest,
    tower_parameters,
)
from vicinal.models.modules import SplitAttention, put, unprepared
from vicinal.types import InputError

__all__ = [
    "ADAPTERS",
    "BitFit",
    "Bottleneck",
    "Full",
    "LastBlocks",
    "LinearHead",
    "LoRA",
    "VisualPrompt",
    "adapt",
    "adapter_state",
    "adapters_from_config",
    "check_adapted",
    "load_adapter_state",
    "locked_towers",
    "merge",
    "parameter_counts",
    "save_peft",
    "trainable",
]


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
                f"unknown method {name!r} in `adapt`{nearest(name, ADAPTERS)}; there are {listed(ADAPTERS)}"
            )
        fields = [field.name for field in dataclasses.fields(ADAPTERS[name])]
        for key in settings or {}:
            if key not in fields:
                raise InputError(f"{name} has no setting {key!r}{nearest(key, fields)}; it has {listed(fields)}")
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


def locked_towers(encoder: Encoder) -> tuple[Literal["image", "text"], ...]:
    """The towers of which nothing is trained: what they say of an image or a text stays as it was."""
    return tuple(
        which
        for which in ("image", "text")
        if (which == "image" or encoder.anatomy.text is not None)
        and not any(p.requires_grad for p in tower_parameters(encoder, which).values())
    )


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
    """A new encoder that computes the same with W + (alpha / r) B A in the place of W, attention fused as it was.

    Nothing of it is marked as trained. What is no sum of weights stays: prompts, bottlenecks and a LinearHead. Without
    these it is of the plain architecture.
    """
    merged = unprepared(copy.deepcopy(encoder))
    for name, module in list(merged.model.named_modules()):
        if hasattr(module, "lora_A"):  # peft's layers
            put(merged.model, name, _merged(module))
    for name, module in list(merged.model.named_modules()):
        if isinstance(module, SplitAttention):
            put(merged.model, name, module.fused())
    anatomy = merged.anatomy
    merged.anatomy = dataclasses.replace(
        anatomy, image=_fused_tower(merged, anatomy.image), text=anatomy.text and _fused_tower(merged, anatomy.text)
    )
    merged.adapters = tuple(method for method in merged.adapters if isinstance(method, LASTING))
    return merged.requires_grad_(False)


def parameter_counts(encoder: Encoder) -> dict[str, int]:
    """How many numbers are trained, there are in all, are left to run after `merge`, and of these were added.

    The text tower, if there is one, is part of "total" and "inference". What an objective holds is its own.
    """
    sizes = {name: p.numel() for name, p in encoder.named_parameters()}
    total = sum(sizes.values())
    lora = sum(size for name, size in sizes.items() if _is_lora(name))
    return {
        "trained": sum(sizes[name] for name in trainable(encoder)),
        "total": total,
        "inference": total - lora,
        "added": sum(
            size for name, size in sizes.items() if name.startswith(("head.", "prompts.")) or ".bottleneck." in name
        ),
    }


def _is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _is_factor(name: str) -> bool:
    """Whether a weight changes nothing, or hardly anything, at the start, so that its death would not be seen."""
    return ".lora_B." in name or name.endswith(".bottleneck.up.weight") or name.startswith("prompts.")


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


def _state_names(encoder: nn.Module) -> list[str]:
    names = list(trainable(encoder))
    for prefix, module in encoder.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            buffers = [f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)]
            names += [name for name in buffers if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set]
    return names


def check_adapted(encoder: Encoder, images: Float[Tensor, "B 3 H W"]) -> None:
    """Prove on a few images, before training, that what is adapted is alive; else raise. All is left as it was.

    1. After one backward pass of a random projection f of the embeddings, every factor has a gradient (LoRA's B and a
       bottleneck's Wup, zero at the start; the prompts of a block), and so has every block of which something is
       trained.
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
    factors = {name: p for name, p in trained.items() if _is_factor(name)}
    of_text = set(tower_parameters(encoder, "text")) if encoder.anatomy.text is not None else set()
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
            raise InputError(f"{_layer(name)} was adapted, but its update gets no gradient: leave it out")
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
            raise InputError(f"{_layer(name)} was adapted, but its update changes nothing: leave it out")
        parameter.copy_(weights[name])


def _project(outputs: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    return torch.stack([(z * d).sum() for z, d in zip(outputs, directions, strict=True)]).sum()


@torch.no_grad()
def _restore(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _layer(name: str) -> str:
    return name.removeprefix("model.").partition(".lora_")[0].partition(".bottleneck.")[0]


def save_peft(encoder: Encoder, folder: str | Path) -> Path:
    """Write the low-rank updates, and trained biases, in peft's layout: adapter_config.json, adapter_model.safetensors.

    `peft.PeftModel.from_pretrained(model, folder)` puts them on the plain timm or transformers model (or on the MLPs of
    an open_clip one).

    Args:
        encoder: adapted by `LoRA`, once or more, and perhaps by `BitFit`, which peft knows as `bias="all"`.
        folder: made if it is not there.

    Raises:
        InputError: the layout cannot hold it: another method is among the adapters, several LoRA differ in dropout, or
            the layers are those of a split attention, which the plain model does not have.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    low_rank = [method for method in encoder.adapters if isinstance(method, LoRA)]
    other = [method for method in encoder.adapters if not isinstance(method, LoRA | BitFit)]
    if other or not low_rank:
        found = other or "no lora"
        raise InputError(f"peft's layout holds lora and bitfit alone, here is {found}; save `merge(encoder)` instead")
    if len({method.dropout for method in low_rank}) > 1:
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
    biases = {}
    if len(low_rank) < len(encoder.adapters):
        biases = {name: p for name, p in model.named_parameters() if p.dim() == 1 and name.endswith("bias")}
    config = LoraConfig(
        base_model_name_or_path=encoder.source,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=low_rank[0].dropout,
        bias="all" if biases else "none",
        target_modules=names,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{name}": bias.detach().cpu().contiguous() for name, bias in biases.items()}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            (linear,) = getattr(layer, part).values()
            tensors[f"base_model.model.{name}.{part}.weight"] = linear.weight.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
