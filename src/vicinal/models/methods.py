"""The methods of adaptation: which weights of an encoder are trained, and which are added.

    LoRA:         y = W x + b + (alpha / r) B A x      A: "r in", Kaiming-uniform; B: "out r", zero; W, b frozen
    LinearHead:   z = V layer_norm(f) + c              V: "D F", Xavier-uniform; c: zero
    VisualPrompt: [_, E_i] = L_i [P_i, E_i-1]          P: learnt tokens, normal; see `models/prompts.py`
    Bottleneck:   u + MLP(norm(u)) + s (Wup relu(Wdown u + bdown) + bup)     Wup, bup: zero
    BitFit:       the biases of the tower; Full: all of the tower; LastBlocks: its last blocks and what follows them

Each is a few numbers with one verb, `apply`, which changes the encoder it is given; `adapt` gives it a copy.

Letters: r rank, f feature of the backbone of F numbers, D numbers an embedding, x input of a layer, E tokens of the
image, L_i block i, C numbers of a token, u what comes out of a block's attention.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from vicinal.models.bottleneck import Detour, norm_of_mlp
from vicinal.models.encoder import Encoder, Tower
from vicinal.models.modules import SplitAttention, put
from vicinal.models.prompts import Prompts
from vicinal.types import InputError

__all__ = [
    "ADAPTERS",
    "LASTING",
    "BitFit",
    "Bottleneck",
    "Full",
    "LastBlocks",
    "LinearHead",
    "LoRA",
    "Method",
    "VisualPrompt",
    "listed",
    "nearest",
    "tower_parameters",
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
        _train(tower_parameters(encoder, self.tower).values(), self, encoder)


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
        parameters = tower_parameters(encoder, self.tower).items()
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


@dataclass(frozen=True, slots=True)
class VisualPrompt:
    """Learnt tokens in front of those of the image, whose tower stays as it is. Jia et al. 2022, arXiv:2203.12119.

    At inference they are needed too, and cost time in proportion to their share of the tokens.

    Args:
        tokens: N, prompts of a block. VPTSP-G: 10 to 90.
        depth: how many blocks, from the first, have prompts of their own, dropped after the block; "deep": all blocks;
            "shallow": the first block's prompts go on through the others.
        decrement: each further block has so many fewer; those that come to none have no prompts.
        dropout: of the prompts' numbers, while training.
        std: of the normal distribution they start from. VPTSP-G's code has sqrt(2 / ((N + 1) C)): 0.022 for 10 of 384.

    >>> VisualPrompt(tokens=5, depth=4, decrement=2).counts(blocks=12)
    [5, 3, 1]
    """

    tokens: int = 10
    depth: int | Literal["shallow", "deep"] = "deep"
    decrement: int = 0
    dropout: float = 0.0
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"visual_prompt.tokens is {self.tokens}; give at least 1")
        if isinstance(self.depth, str) and self.depth not in ("shallow", "deep"):
            raise InputError(f"visual_prompt.depth is {self.depth!r}; give shallow, deep or a number of blocks")
        if isinstance(self.depth, int) and self.depth < 1:
            raise InputError(f"visual_prompt.depth is {self.depth}; give at least 1 block, or shallow or deep")
        if self.decrement < 0 or (self.decrement and self.depth == "shallow"):
            raise InputError(
                f"visual_prompt.decrement is {self.decrement}; give 0 or more prompts fewer a block (shallow: 0)"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"visual_prompt.dropout is {self.dropout}; give a share, from 0 up to 1")
        if self.std <= 0:
            raise InputError(f"visual_prompt.std is {self.std}; give a positive number: equal prompts would stay equal")

    def counts(self, blocks: int) -> list[int]:
        """How many prompts each block of a tower of so many has, from the first to the last that has any."""
        depth = {"shallow": 1, "deep": blocks}[self.depth] if isinstance(self.depth, str) else self.depth
        counts = [self.tokens - i * self.decrement for i in range(depth)]
        return [count for count in counts if count > 0]

    def apply(self, encoder: Encoder) -> None:
        """Give the encoder its prompts."""
        blocks = len(_tower(encoder, "image").blocks)
        if encoder.prompts is not None:
            raise InputError(f"{encoder.source} has visual prompts already; give one visual_prompt")
        if isinstance(self.depth, int) and self.depth > blocks:
            raise InputError(
                f"visual_prompt.depth is {self.depth}, but {encoder.source} has {blocks} blocks in its image tower"
            )
        prompts = Prompts(
            self.counts(blocks),
            _check_halves(encoder),
            std=self.std,
            dropout=self.dropout,
            carried=self.depth == "shallow",
        )
        encoder.prompts = prompts.to(encoder.device).train(encoder.training)


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A narrow layer beside the MLP of each block: u + MLP(norm(u)) + s (Wup relu(Wdown u + bdown) + bup).

    Chen et al. 2022 (AdaptFormer), arXiv:2205.13535. Wup and bup are zero at the start, so the first output is that of
    the encoder it was made from. It has no norm of its own, and stands in the image tower.

    Args:
        dim: numbers of the narrow side. AdaptFormer: 64.
        scale: s. AdaptFormer: 0.1; the overlap adapter: 0.03 trained with labels, 0.1 by DINO.
        dropout: on the narrow side, while training.
        first_block: blocks before this one (counted from 0) get none.

    >>> Bottleneck(dim=64).scale
    0.1
    """

    dim: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    first_block: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise InputError(f"bottleneck.dim is {self.dim}; give at least 1")
        if self.scale == 0:
            raise InputError("bottleneck.scale is 0, which adds nothing; give a factor such as 0.1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"bottleneck.dropout is {self.dropout}; give a share, from 0 up to 1")

    def apply(self, encoder: Encoder) -> None:
        """Put one into each block."""
        tower = _tower(encoder, "image")
        if not 0 <= self.first_block < len(tower.blocks):
            raise InputError(
                f"bottleneck.first_block is {self.first_block}, but the image tower of {encoder.source} has "
                f"{len(tower.blocks)} blocks, counted from 0"
            )
        blocks = [encoder.model.get_submodule(name) for name in tower.blocks[self.first_block :]]
        if taken := [block for block in blocks if any(isinstance(child, Detour) for child in block.children())]:
            raise InputError(f"{len(taken)} blocks of {encoder.source} have a bottleneck already; give one for each")
        norm = norm_of_mlp(blocks[0], tower.mlp[0], lambda: encoder.encode_image(_blank(encoder)))
        if norm is None:
            raise InputError(
                f"the blocks of {encoder.source} have no norm in front of their MLP, so a bottleneck has no place "
                "beside it; use lora"
            )
        for block in blocks:
            width = cast(nn.Linear, block.get_submodule(tower.mlp[0])).in_features
            detour = Detour(width, self.dim, scale=self.scale, dropout=self.dropout)
            detour.to(encoder.device).train(encoder.training).attach(block, block.get_submodule(norm))


Method = Full | LastBlocks | LinearHead | BitFit | LoRA | VisualPrompt | Bottleneck

ADAPTERS: dict[str, type[Method]] = {
    "full": Full,
    "last_blocks": LastBlocks,
    "linear_head": LinearHead,
    "bitfit": BitFit,
    "lora": LoRA,
    "visual_prompt": VisualPrompt,
    "bottleneck": Bottleneck,
}
"""The name in a recipe -> the class."""

LASTING = (LinearHead, VisualPrompt, Bottleneck)
"""What `merge` leaves as it is: layers of their own, which are no sum of weights."""


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


def tower_parameters(encoder: Encoder, which: Which) -> dict[str, nn.Parameter]:
    """Parameters by name: of the image is what stands under the same child of the model as its blocks or heads do."""
    everything = {n: p for n, p in encoder.named_parameters() if not n.endswith(".mask_token")}  # pre-training's alone
    anatomy = encoder.anatomy
    if which in ("text", "both"):
        _tower(encoder, "text")
    if which == "both" or anatomy.text is None:
        return everything
    named = [*anatomy.image.blocks, anatomy.patch_embed, *anatomy.heads, *filter(None, [anatomy.image.norm])]
    roots = {name.split(".")[0] for name in named}
    own = ("head.", "prompts.")
    image = {n: p for n, p in everything.items() if n.startswith(own) or n.split(".")[1] in roots}
    if which == "image":
        return image
    scales = ("model.logit_scale", "model.logit_bias")
    return {name: p for name, p in everything.items() if name not in image and name not in scales}


@torch.no_grad()
def _check_halves(encoder: Encoder) -> int:
    """C, after proof on a blank image that the two halves of the image tower make the whole.

    Raises:
        InputError: they do not, or it is not known how to cut it open.
    """
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    images = _blank(encoder)
    tokens = encoder.patch_tokens(images)
    whole, halves = encoder.encode_image(images), encoder.encode_tokens(tokens)
    for module, mode in modes.items():
        module.training = mode
    if not torch.allclose(whole, halves, rtol=1e-2, atol=1e-3 * float(whole.abs().max())):
        raise InputError(f"{encoder.source} runs its blocks in a way of its own, so it takes no prompts; use lora")
    return tokens.shape[-1]


def _blank(encoder: Encoder) -> Tensor:
    return torch.zeros(
        1, 3, *encoder.preprocess.size, device=encoder.device, dtype=next(encoder.model.parameters()).dtype
    )


def _is_bias(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last == "bias" or (last.endswith("_bias") and last != "logit_bias")


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
                f"lora.targets: {source} has no {target!r}{nearest(target, words)}; it has {listed(words)}{why}"
            )
    if not targets:
        raise InputError(f"lora.targets is empty; choose among {listed(words)}")
    return list(dict.fromkeys(name for target in targets for name in words[target]))


def _split_attention(encoder: Encoder, which: Literal["image", "text"]) -> Tower:
    """Replace every fused attention of a tower, and say so in the anatomy."""
    tower = _tower(encoder, which)
    name = tower.attention["fused"]
    for block in tower.blocks:
        attention = cast(nn.MultiheadAttention, encoder.model.get_submodule(f"{block}.{name}"))
        put(encoder.model, f"{block}.{name}", SplitAttention(attention))
    split = dataclasses.replace(tower, attention={role: f"{name}.{role}" for role in ("q", "k", "v", "out")})
    encoder.anatomy = (
        dataclasses.replace(encoder.anatomy, image=split)
        if which == "image"
        else dataclasses.replace(encoder.anatomy, text=split)
    )
    return split


def listed(words: Iterable[str]) -> str:
    """As they stand in a message."""
    return ", ".join(words)


def nearest(word: str, words: Iterable[str]) -> str:
    """A guess at what was meant, for a message; else nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
