"""Averages of weights: between original and tuned encoder (WiSE-FT), of several tuned ones (soup), over steps (EMA).

    soup:     theta = sum_i v_i theta_i,  sum_i v_i = 1             Wortsman et al. 2022, arXiv:2203.05482
    WiSE-FT:  theta = (1 - w) theta_before + w theta_after          Wortsman et al. 2021, arXiv:2109.01903
    EMA:      average <- d average + (1 - d) theta,   d = min(decay, (1 + t) / (10 + t))

Letters: v shares of the encoders, w weight of the tuned encoder, d decay, t updates so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vicinal.models.adapters import Bottleneck, LinearHead, VisualPrompt, merge
from vicinal.models.encoder import Encoder
from vicinal.types import InputError

__all__ = ["EMA", "average", "interpolate"]


def interpolate(before: Encoder, after: Encoder, weight: float) -> Encoder:
    """A new encoder of the plain architecture, between two: (1 - w) before + w after, over the merged weights.

    Weights are interpolated, buffers are `after`'s. A head that only `after` has is left alone: there is nothing to
    interpolate it with. The logit scale of an image-text model is kept as a logarithm, and interpolated as one.

    Args:
        before: usually the original.
        after: the same architecture, adapted in any way.
        weight: w, from 0 (before) to 1 (after).

    Raises:
        InputError: w is outside 0 to 1, the two are not of one architecture and input size, or only one has prompts or
            bottlenecks, so that there is nothing between them.
    """
    if not 0 <= weight <= 1:
        raise InputError(f"the interpolation weight is {weight}; give 0 (the original) to 1 (the tuned model)")
    old, new = merge(before), merge(after)
    added = [[m for m in encoder.adapters if isinstance(m, VisualPrompt | Bottleneck)] for encoder in (old, new)]
    if added[0] != added[1]:
        raise InputError(
            f"{before.source} has {added[0] or 'nothing'} where the tuned model has {added[1] or 'nothing'}: there is "
            "nothing between them; take the tuned model as it is (in a recipe: leave wise_ft out)"
        )
    heads = [sum(isinstance(method, LinearHead) for method in encoder.adapters) for encoder in (old, new)]
    pairs = [(old.model, new.model)] if heads[0] != heads[1] else [(old, new)]
    for first, second in pairs:
        theirs = dict(first.named_parameters())
        ours = dict(second.named_parameters())
        for name in sorted({*theirs, *ours}):
            if name not in theirs or name not in ours or theirs[name].shape != ours[name].shape:
                raise InputError(
                    f"{before.source} and {after.source} cannot be interpolated: {name} is not the same in both; "
                    "they must be one architecture at one input size"
                )
            with torch.no_grad():
                ours[name].copy_(torch.lerp(theirs[name].to(ours[name]), ours[name], weight))
    return new


def average(encoders: Sequence[Encoder], shares: Sequence[float] | None = None) -> Encoder:
    """A soup: one encoder whose weights are the mean of those of several, as of trainings with several seeds.

    All must come from one pretrained model; of trainings from random weights the mean is worth nothing. Buffers are
    the last one's. The logit scale of an image-text model is a logarithm, and averaged as one.

    Args:
        encoders: of one architecture and input size, adapted in any way; their adapters are merged first.
        shares: v, not negative; scaled to a sum of 1. None: all alike.

    Raises:
        InputError: there is none; shares that are not as many, negative or all zero; encoders that differ in
            architecture, or that have heads, prompts or bottlenecks not all have.

    >>> from vicinal.models.backbones import load_encoder
    >>> one, other = (load_encoder("timm:test_vit", size=32, random_init=True) for _ in range(2))
    >>> same = average([one, other], shares=[1, 0])
    >>> x = torch.rand(1, 3, 32, 32)
    >>> torch.allclose(same.encode_image(x), one.encode_image(x), atol=1e-5)
    True
    """
    values = [1.0] * len(encoders) if shares is None else list(shares)
    if not encoders or len(values) != len(encoders) or min(values) < 0 or sum(values) <= 0:
        raise InputError(
            f"{len(encoders)} encoders and the shares {values}: give one at least, and for each a share of 0 or more, "
            "not all of them 0"
        )
    if len({sum(isinstance(method, LinearHead) for method in encoder.adapters) for encoder in encoders}) > 1:
        raise InputError("some of the encoders have a new head and some have none: there is nothing to average it with")
    # A running mean: each is taken in with its share of what is in by then.
    soup, taken = merge(encoders[0]), values[0]
    for encoder, share in zip(encoders[1:], values[1:], strict=True):
        taken += share
        soup = interpolate(soup, encoder, share / taken if taken else 1.0)
    return soup


class EMA:
    """A running average of the trained weights: d average + (1 - d) theta, d rising to `decay` over the first steps.

    Args:
        module: its parameters that require a gradient are averaged, in float32.
        decay: d in the long run; 0.999 averages over about the last thousand steps.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(layer.weight); ema = EMA(layer, decay=0.5)
    >>> _ = nn.init.ones_(layer.weight); ema.update()
    >>> with ema.applied():
    ...     print(round(layer.weight.item(), 3))
    0.9
    >>> layer.weight.item()
    1.0
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema is {decay}; give a decay from 0 up to 1, such as 0.999")
        self.decay = decay
        self.updates = 0
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights: call it after each optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in self._parameters.items():
            self.average[name].lerp_(parameter.detach().to(self.average[name]), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within: the module holds the averages. After: its own weights, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(own)

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint needs."""
        return {"updates": self.updates, "average": {name: value.clone() for name, value in self.average.items()}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            InputError: the averages are of other weights.
        """
        average = state["average"]
        if not isinstance(average, dict) or set(average) != set(self.average):
            raise InputError("the checkpoint holds the averages of other weights; resume with the recipe it came from")
        self.updates = int(str(state["updates"]))
        for name, value in average.items():
            self.average[name].copy_(value)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
