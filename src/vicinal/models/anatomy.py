"""Where the parts of a model are, found by their layout; and positions for another grid of patches.

Letters: T tokens (class and register tokens, then the grid row by row), C numbers a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vicinal.models.encoder import Tower
from vicinal.types import InputError

__all__ = [
    "ATTENTION",
    "MLP",
    "check_divides",
    "find_tower",
    "has_weights",
    "pair",
    "resample",
    "submodule",
    "with_weights",
]


ATTENTION: tuple[Mapping[str, str], ...] = (
    {"qkv": "attn.qkv", "out": "attn.proj"},  # timm
    {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "out": "attn.proj"},  # timm, EVA
    {"fused": "attn"},  # open_clip
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"},  # CLIP
    {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "out": "attention.o_proj"},  # ViT
    {  # ViT and DINOv2 of earlier transformers 5
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "out": "attention.output.dense",
    },
    {  # BERT and its kin: text towers in open_clip
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "out": "attention.output.dense",
    },
)
"""How the attention of a block is laid out: role -> name within the block. The first that fits is taken."""


MLP: tuple[tuple[str, ...], ...] = (
    ("mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"),  # timm, SwiGLU
    ("mlp.fc1", "mlp.fc2"),
    ("mlp.w0", "mlp.w1", "mlp.w2"),  # timm, ViTamin
    ("mlp.c_fc", "mlp.c_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("mlp.weights_in", "mlp.weights_out"),
    ("intermediate.dense", "output.dense"),
)
"""How the feed-forward part of a block is laid out. The first that fits is taken."""


def find_tower(model: nn.Module, prefix: str = "", norm: str | None = None) -> Tower:
    """The transformer blocks below `prefix`, found by their layout: a block is what holds an attention and an MLP.

    A tower without any (a convolutional network, or a layout not in `ATTENTION` and `MLP`) has no blocks.

    >>> layer = nn.TransformerEncoderLayer(8, 2)      # torch's own layout is not in the tables
    >>> find_tower(layer).blocks
    ()
    """
    found: list[str] = []
    layout: tuple[Mapping[str, str], tuple[str, ...]] | None = None
    for name, module in model.named_modules():
        if not name.startswith(prefix):
            continue
        attention = next((roles for roles in ATTENTION if _fits(module, roles)), None)
        mlp = next((names for names in MLP if _fits(module, dict.fromkeys(names)) and names), None)
        if attention is None or mlp is None:
            continue
        if layout is None:
            layout = (attention, mlp)
        if layout == (attention, mlp):
            found.append(name)
    norm = norm if norm is not None and has_weights(model, norm) else None
    return Tower(tuple(found), dict(layout[0]), layout[1], norm) if layout else Tower(norm=norm)


def _fits(block: nn.Module, roles: Mapping[str, str | None]) -> bool:
    """Whether all names are there, as Linear layers; "fused" as an nn.MultiheadAttention."""
    for role, name in roles.items():
        kind: type[nn.Module] = nn.MultiheadAttention if role == "fused" else nn.Linear
        if not isinstance(submodule(block, name or role), kind):
            return False
    return True


def submodule(module: nn.Module, name: str) -> nn.Module | None:
    """The module at a dotted name, or None."""
    for part in name.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


def has_weights(model: nn.Module, name: str) -> bool:
    """Whether `name` is a parameter, or a module with any (an Identity has none)."""
    return any(key == name or key.startswith(f"{name}.") for key, _ in model.named_parameters())


def with_weights(model: nn.Module, *names: str) -> tuple[str, ...]:
    """Those of `names` that `has_weights`."""
    return tuple(name for name in names if has_weights(model, name))


def pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width, from either form."""
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise InputError(f"size {height} x {width} is not a size in pixels")
    return height, width


def check_divides(size: tuple[int, int], patch: int | Sequence[int]) -> None:
    """Refuse a size of which the last pixels would fall off the grid of patches.

    Raises:
        InputError: with the nearest size that fits.
    """
    patches = pair(patch) or (1, 1)
    if any(pixels % step for pixels, step in zip(size, patches, strict=True)):
        near = [max(round(pixels / step), 1) * step for pixels, step in zip(size, patches, strict=True)]
        raise InputError(
            f"size {size[0]} x {size[1]} is not a multiple of the model's patches of {patches[0]} x {patches[1]} "
            f"pixels; the nearest is {near[0]} x {near[1]}"
        )


def resample(
    positions: Float[Tensor, "T C"],
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    prefix: int,
    antialias: bool,
) -> nn.Parameter:
    """Position embeddings of an `old` grid of patches -> a `new` one, bicubic; the first `prefix` rows stay."""
    kept = positions.detach()
    if old != new:
        grid_11HW = kept[prefix:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
        grid_11HW = F.interpolate(grid_11HW, size=new, mode="bicubic", antialias=antialias, align_corners=False)
        rows = grid_11HW.permute(0, 2, 3, 1).flatten(0, 2).to(kept.dtype)
        kept = torch.cat([kept[:prefix], rows])
    return nn.Parameter(kept, requires_grad=positions.requires_grad)
