"""Staying near a teacher: the frozen original (Retention), or the running average of the student itself (DINO).

    Retention  w mean_i (1 - x_i . z_i / (|x_i| |z_i|))
    DINO       mean over i and over (u, v), u != v, of  -sum_k q_uik log p_vik,
               q_ui = softmax((t_ui - c) / tau_t),   p_vi = softmax(s_vi / tau_s),   c <- m c + (1 - m) mean_ui t_ui

Letters: B batch, D numbers an embedding, x embeddings of the model that is tuned, z those of the frozen original for
the same images, w weight; S views of the student, of which the first T are the teacher's too, K prototypes, s and t
the logits of student and teacher, c centre, m its momentum, tau temperatures.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vicinal.losses.cosine import unit

__all__ = ["DINO", "Retention"]


class Retention(nn.Module):
    """The price of leaving the original: the mean cosine distance to its embeddings, times a weight.

    What tuning gains on the classes it sees, it tends to lose on others; this holds the features where nothing pulls.
    The squared Euclidean distance of unit vectors is twice the cosine distance, so it is the same loss with w halved.

    Args:
        weight: w. 0 costs nothing and holds nothing; 1 to 10 is a beginning for margin losses.

    Raises:
        ValueError: the weight is below 0.

    >>> retention = Retention(weight=2.0)
    >>> retention(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]])).item()    # at a right angle
    2.0
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"the weight of retention must be 0 or above, not {weight}")
        self.weight = weight

    def forward(self, embeddings: Float[Tensor, "B D"], original: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        """The weighted mean distance; no gradient goes to `original`."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.weight * (1 - (unit(embeddings) * unit(original.detach())).sum(-1)).mean()


class DINO(nn.Module):
    """Self-distillation: each view's prototypes are to be those that the teacher sees in another view of the image.

    Caron et al. 2021, arXiv:2104.14294. Two forces keep the teacher from giving one answer to all: its centre, the
    running mean of its logits, is taken off (else one prototype wins), and its temperature is below the student's (else
    all are equal). The centre is moved after each loss that is taken while training, by the mean over *all* teacher
    logits, of every process where there are several.

    Args:
        prototypes: K. The paper: 65,536; on a small machine 4,096.
        student_temperature: tau_s. The paper: 0.1.
        teacher_temperature: tau_t; whoever trains may change it from step to step. The paper: 0.04, at most 0.07.
        centre_momentum: m. The paper: 0.9.

    Raises:
        ValueError: a setting is out of its range.

    >>> loss = DINO(2, student_temperature=1.0, teacher_temperature=1.0).eval()
    >>> views = torch.zeros(2, 1, 2)                            # two views of one image, both undecided: ln 2
    >>> round(loss(views, views).item(), 4)
    0.6931
    """

    centre: Tensor

    def __init__(
        self,
        prototypes: int,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if prototypes < 2:
            raise ValueError(f"DINO needs at least 2 prototypes, not {prototypes}")
        if not (student_temperature > 0 and teacher_temperature > 0):
            raise ValueError(f"temperatures must be above 0, not {student_temperature} and {teacher_temperature}")
        if not 0 <= centre_momentum < 1:
            raise ValueError(f"the momentum of the centre must be from 0 to below 1, not {centre_momentum}")
        self.student_temperature = student_temperature
        self.teacher_temperature: float | Tensor = teacher_temperature
        self.centre_momentum = centre_momentum
        self.register_buffer("centre", torch.zeros(prototypes))

    def forward(self, student: Float[Tensor, "S B K"], teacher: Float[Tensor, "T B K"]) -> Float[Tensor, ""]:
        """The mean cross-entropy over the T (S - 1) pairs of two views, in float32; the teacher gets no gradient.

        Args:
            student: logits; the first T views are those that the teacher saw.
            teacher: logits.

        Raises:
            ValueError: there are not two different views, or fewer of the student than of the teacher.
        """
        S, T = len(student), len(teacher)
        if S < 2 or not 1 <= T <= S:
            raise ValueError(f"DINO compares different views: give 2 or more of the student, not {S} against {T}")
        with torch.autocast(student.device.type, enabled=False):
            seen_TBK = _wide(teacher.detach())
            q_TBK = self.assigned(seen_TBK)
            logits_SBK = _wide(student) / self.student_temperature
            # Of all pairs at once: sum_uv q_u . log p_v, less the pairs of a view with itself.
            among_SB = logits_SBK.logsumexp(-1)
            every = (q_TBK.sum(0) * logits_SBK.sum(0)).sum(-1) - T * among_SB.sum(0)
            same = ((q_TBK * logits_SBK[:T]).sum(-1) - among_SB[:T]).sum(0)
            loss = -(every - same).mean() / (T * (S - 1))
            if self.training:
                self._move_centre(seen_TBK)
        return loss

    def assigned(self, teacher: Float[Tensor, "*T K"]) -> Float[Tensor, "*T K"]:
        """q: the prototypes that these logits of the teacher mean, centred and sharpened."""
        return ((_wide(teacher) - self.centre) / self.teacher_temperature).softmax(-1)

    @torch.no_grad()
    def _move_centre(self, seen_TBK: Tensor) -> None:
        # The sum and the number of rows, so that the mean is right where processes have shares of different sizes.
        total = torch.cat([seen_TBK.flatten(0, 1).sum(0), seen_TBK.new_tensor([len(seen_TBK) * seen_TBK.shape[1]])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        self.centre.lerp_((total[:-1] / total[-1]).to(self.centre.dtype), 1 - self.centre_momentum)


def _wide(values: Tensor) -> Tensor:
    """In float32 or wider: 65,536 exponentials are summed."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
