"""An adapter that has learnt nothing, but moves embeddings as far as one that has: what is left of a gain is chance.

    distance = mean_i (1 - cos(x_i, z_i)),   x with the adapter, z without

Letters: B images, x and z embeddings.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vicinal.models.adapters import adapt
from vicinal.models.encoder import Encoder
from vicinal.models.methods import Bottleneck
from vicinal.types import InputError

__all__ = ["moved", "random_bottleneck"]

TRIES = 40


@torch.no_grad()
def moved(encoder: Encoder, original: Encoder, images: Float[Tensor, "B 3 H W"]) -> float:
    """The mean cosine distance between what two encoders make of the same images.

    >>> from vicinal.models.backbones import load_encoder
    >>> encoder = load_encoder("timm:test_vit", size=32, random_init=True)
    >>> abs(round(moved(encoder, encoder, torch.rand(2, 3, 32, 32)), 5))
    0.0
    """
    both = (encoder.encode_image(images), original.encode_image(images))
    return float(1 - nn.functional.cosine_similarity(*both, dim=1).mean())


def random_bottleneck(
    original: Encoder,
    method: Bottleneck,
    images: Float[Tensor, "B 3 H W"],
    *,
    distance: float,
    seed: int = 0,
) -> Encoder:
    """The encoder with bottlenecks of random weights, which move its embeddings as far as is asked.

    Down-projections are drawn as those of a fresh bottleneck, up-projections normal, all of one standard deviation,
    which is found by halving.

    Args:
        original: without the adapter.
        method: of the adapter to stand beside.
        images: on which the distance is measured: the same as for the trained adapter (`moved`).
        distance: mean cosine distance to the original.
        seed: of the weights.

    Raises:
        InputError: no standard deviation moves them so far.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = adapt(original, method).eval()
        ups = [p for name, p in encoder.named_parameters() if name.endswith(".bottleneck.up.weight")]
        drawn = [torch.randn(p.shape) for p in ups]

    def at(std: float) -> float:
        with torch.no_grad():
            for parameter, noise in zip(ups, drawn, strict=True):
                parameter.copy_(std * noise)
        return moved(encoder, original, images)

    low, high = 0.0, 0.1
    while not at(high) >= distance:  # an overflow is NaN, and moves nothing
        low, high = high, 2 * high
        if high > 1e4:
            raise InputError(f"random weights move these embeddings by less than {distance}: ask for less")
    for _ in range(TRIES):
        middle = (low + high) / 2
        found = at(middle)
        if abs(found - distance) < 0.01 * distance:
            break
        low, high = (middle, high) if found < distance else (low, middle)
    return encoder.requires_grad_(False)
