"""What is optimised at which rate, and how the rate goes over the steps.

    rate(t) = (t + 1) / W                                             for t < W, the warm-up
    rate(t) = f + (1 - f) (1 + cos(pi (t - W) / (T - W))) / 2         after it
    decay(t) = d1 + (d0 - d1) (1 + cos(pi t / T)) / 2                 where it changes

Letters: t the step, from 0; T all steps; W those of the warm-up; f the share of the rate that is left in the end; d0
and d1 the first and last weight decay.

The rate is that of a *step*, and T is the exact number of them: a schedule counted in epochs by mistake never gets out
of its warm-up, and one that begins with 0 wastes its first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vicinal.models.encoder import Anatomy, Encoder
from vicinal.models.methods import tower_parameters
from vicinal.types import InputError

__all__ = ["build_optimizer", "clip_each", "parameter_groups", "warmup_cosine"]


def parameter_groups(
    objective: nn.Module,
    *,
    lr: float,
    loss_lr: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Every parameter that is trained, in groups of one rate and decay: "encoder", "encoder, no decay" and "loss".

    Biases, norms, all else of one axis and prompts are not decayed. The loss's own parameters are a group of their own:
    left out of the optimiser, class weights stay random without a word (PML issue 355). They are not decayed, since
    only their direction counts.

    With a layer decay d below 1, what lies n layers below the top of its tower learns at lr d^n (BEiT,
    arXiv:2106.08254): the last norm, the projection, a head and prompts at lr, the last of L blocks at
    lr d, the first at lr d^L, the embeddings in front of it at lr d^(L + 1). Each tower is counted for itself.

    Args:
        objective: its submodule `criterion` is the loss, `encoder` the model.
        lr: of the encoder; with a layer decay, of its top.
        loss_lr: of the loss's parameters. Default: 10 x lr, as in PML issue 534 and UNICOM (arXiv:2304.05884).
        weight_decay: of the encoder's weights of two axes and more.
        layer_decay: d, from above 0 to 1; 1 is none. Fine-tuned CLIP: 0.6 to 0.75 (arXiv:2212.06138).

    Returns:
        Groups for a torch optimiser, the fastest first and the loss last; those without parameters are left out.

    Raises:
        InputError: nothing is trained, or a layer decay is asked for and the blocks of a trained tower are not known.

    >>> objective = nn.Module()
    >>> objective.encoder, objective.criterion = nn.Linear(4, 3), nn.Linear(3, 2, bias=False)
    >>> [(g["name"], g["lr"], g["weight_decay"]) for g in parameter_groups(objective, lr=0.1, weight_decay=0.05)]
    [('encoder', 0.1, 0.05), ('encoder, no decay', 0.1, 0.0), ('loss', 1.0, 0.0)]
    """
    depths = {} if layer_decay == 1 else _depths(objective.get_submodule("encoder"))
    of_encoder: dict[tuple[int, bool], dict[str, Any]] = {}
    own = []
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("criterion."):
            own.append(parameter)
            continue
        depth = depths.get(name.removeprefix("encoder."), 0)
        decays = parameter.dim() > 1 and not name.startswith("encoder.prompts.")
        at = f", {depth} layers down" if depth else ""
        new: dict[str, Any] = {"name": f"encoder{at}" if decays else f"encoder{at}, no decay", "params": []}
        new |= {"lr": lr * layer_decay**depth, "weight_decay": weight_decay if decays else 0.0}
        of_encoder.setdefault((depth, not decays), new)["params"].append(parameter)
    groups = [of_encoder[key] for key in sorted(of_encoder)]
    if own:
        rate = 10 * lr if loss_lr is None else loss_lr
        groups.append({"name": "loss", "params": own, "lr": rate, "weight_decay": 0.0})
    if not groups:
        raise InputError("nothing is trained: every parameter is frozen; give `adapt` a method, as lora or full")
    return groups


def _depths(encoder: nn.Module) -> dict[str, int]:
    """How many layers below the top of its tower each trained parameter lies; what is not named lies at the top."""
    assert isinstance(encoder, Encoder)
    depths = {}
    for which in ("image", "text"):
        tower = encoder.anatomy.image if which == "image" else encoder.anatomy.text
        if tower is None:
            continue
        trained = [name for name, p in tower_parameters(encoder, which).items() if p.requires_grad]
        if trained and not tower.blocks:
            raise InputError(
                f"layer_decay: the blocks of the {which} tower of {encoder.source} are not known; leave it out"
            )
        for name in trained:
            inner = name.removeprefix("model.")
            block = next((i for i, at in enumerate(tower.blocks) if inner.startswith(f"{at}.")), None)
            if block is not None:
                depths[name] = len(tower.blocks) - block
            elif name.startswith("model.") and _is_in_front(inner, encoder.anatomy, which):
                depths[name] = len(tower.blocks) + 1
    return depths


def _is_in_front(name: str, anatomy: Anatomy, which: str) -> bool:
    """Whether a parameter outside of the blocks is met before them; of an image tower, all that follows is named."""
    if which == "text":
        return "emb" in name  # token_embedding, positional_embedding, embeddings.LayerNorm, cls_emb
    after = [*anatomy.heads, *filter(None, [anatomy.image.norm])]
    return not any(name == at or name.startswith(f"{at}.") for at in after)


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimiser called "adamw" (betas .9 and .999, epsilon 1e-8) or "sgd" (momentum .9, no Nesterov).

    Both in torch's fused form: one pass over the numbers.

    Raises:
        InputError: there is no such optimiser.

    >>> import torch
    >>> build_optimizer("sgd", [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}]).defaults["momentum"]
    0.9
    """
    if name == "adamw":
        return AdamW(groups, fused=True)
    if name == "sgd":
        return SGD(groups, momentum=0.9, fused=True)
    raise InputError(f"there is no optimiser {name!r}; choose adamw or sgd")


def clip_each(optimizer: Optimizer, largest: float) -> None:
    """From now on, before each step, shorten the gradient of every parameter that is longer than this, on its own.

    DINO's way, beside the usual norm over all parameters: no one parameter's gradient makes the others' small.

    Args:
        optimizer: of the parameters.
        largest: norm of the gradient of one parameter. DINO: 3, and 0.3 for larger ViTs.

    >>> import torch
    >>> weights = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    >>> optimizer = SGD(weights, lr=1.0); clip_each(optimizer, 1.0)
    >>> weights[0].grad, weights[1].grad = torch.tensor([30.0, 40.0]), torch.tensor([0.5])
    >>> optimizer.step(); [round(value, 3) for weight in weights for value in weight.tolist()]
    [-0.6, -0.8, -0.5]
    """

    def clip(optimizer: Optimizer, arguments: Any, settings: Any) -> None:  # noqa: ANN401  of a step: of no use here
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                nn.utils.clip_grad_norm_(parameter, largest)

    optimizer.register_step_pre_hook(clip)


def warmup_cosine(
    optimizer: Optimizer,
    *,
    steps: int,
    warmup: int = 0,
    final: float = 0.0,
    final_decay: float | None = None,
) -> LambdaLR:
    """A linear warm-up and then half a cosine down to zero; to be stepped once each optimiser step.

    Args:
        optimizer: its groups' rates are the peaks.
        steps: T.
        warmup: W, in steps. Usual: 5 % of T.
        final: f, the share of the peak at the end; 1: the rate stays.
        final_decay: d1, of the groups that decay at all; None: the weight decay stays. DINO: .04 -> .4.

    Raises:
        ValueError: `warmup` is not from 0 to below `steps`, or `final` not from 0 to 1.

    >>> import torch
    >>> optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = warmup_cosine(optimizer, steps=6, warmup=2)
    >>> rates = []
    >>> for _ in range(6):
    ...     rates.append(round(schedule.get_last_lr()[0], 3))
    ...     optimizer.step(); schedule.step()
    >>> rates
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be from 0 to below the {steps} steps, not {warmup}")
    if not 0 <= final <= 1:
        raise ValueError(f"final is the share of the rate that is left in the end, from 0 to 1, not {final}")

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min(1.0, (step - warmup) / (steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))

    return LambdaLR(optimizer, rate) if final_decay is None else _WithDecay(optimizer, rate, steps, final_decay)


class _WithDecay(LambdaLR):
    """Rate and weight decay; where it is, `state_dict` says: the decay is a function of the step, as the rate is."""

    def __init__(self, optimizer: Optimizer, rate: Callable[[int], float], steps: int, final: float) -> None:
        self.decays = [(group.get("weight_decay", 0.0), final) for group in optimizer.param_groups]
        self.steps = steps
        super().__init__(optimizer, rate)

    def step(self, epoch: int | None = None) -> None:
        """Once each optimiser step."""
        super().step(epoch)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, self.last_epoch / self.steps)))
        for group, (first, final) in zip(self.optimizer.param_groups, self.decays, strict=True):
            if first:
                group["weight_decay"] = final + (first - final) * share
