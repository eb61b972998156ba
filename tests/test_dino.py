"""Self-distillation: the loss against a loop, its centre in one process and in two, the teacher, exact resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from several import started
from tiny_encoders import FAMILIES
from vicinal.losses import DINO, CrossEntropy
from vicinal.models.adapters import Bottleneck, Full, LoRA, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.models.modules import DINOHead
from vicinal.training.distillation import SelfDistillation
from vicinal.training.loop import fit
from vicinal.training.optim import build_optimizer, clip_each, parameter_groups, warmup_cosine
from vicinal.types import InputError

WORKER = Path(__file__).with_name("dino_worker.py")
K = 12


def softmax(values: list[float]) -> list[float]:
    above = [math.exp(v - max(values)) for v in values]
    return [a / sum(above) for a in above]


def by_hand(student: Tensor, teacher: Tensor, centre: list[float], student_t: float, teacher_t: float) -> float:
    terms = []
    for u in range(len(teacher)):
        for v in range(len(student)):
            if u == v:
                continue
            for i in range(student.shape[1]):
                q = softmax([(t - c) / teacher_t for t, c in zip(teacher[u, i].tolist(), centre, strict=True)])
                p = softmax([s / student_t for s in student[v, i].tolist()])
                terms.append(-sum(a * math.log(b) for a, b in zip(q, p, strict=True)))
    assert len(terms) == len(teacher) * (len(student) - 1) * student.shape[1]
    return sum(terms) / len(terms)


def logits(views: int, seed: int, batch: int = 3) -> Tensor:
    return torch.randn(views, batch, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("S", "T"), [(2, 2), (12, 2), (5, 1), (2, 1)])
@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (1.0, 0.5)])
def test_equals_the_loop(S: int, T: int, temperatures: tuple[float, float]):
    loss = DINO(K, student_temperature=temperatures[0], teacher_temperature=temperatures[1]).double()
    centre = torch.zeros(K, dtype=torch.float64)
    for step in range(3):  # with the centre as it then is
        student, teacher = logits(S, 2 * step), logits(T, 2 * step + 1)
        assert loss(student, teacher).item() == pytest.approx(by_hand(student, teacher, centre.tolist(), *temperatures))
        centre = 0.9 * centre + 0.1 * teacher.mean((0, 1))
        assert torch.allclose(loss.centre, centre)


def test_the_gradient_is_that_of_finite_differences_and_none_goes_to_the_teacher():
    loss = DINO(K).double().eval()
    student, teacher = logits(4, 0).requires_grad_(), logits(2, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    loss(student, teacher).backward()
    assert teacher.grad is None


def test_after_one_step_the_centre_is_a_tenth_of_the_mean():
    loss, teacher = DINO(K).double(), logits(2, 3)
    loss(logits(12, 4), teacher)
    assert torch.allclose(loss.centre, 0.1 * teacher.mean((0, 1)))
    loss.eval()
    kept = loss.centre.clone()
    loss(logits(12, 4), teacher)
    assert torch.equal(loss.centre, kept), "evaluation moves nothing"


def test_a_student_that_is_the_teacher_pays_the_entropy():
    loss = DINO(K, student_temperature=0.1, teacher_temperature=0.1).double().eval()
    view = logits(1, 5)
    same = torch.cat([view, view])
    q = loss.assigned(view)
    entropy = -(q * q.log()).sum(-1).mean().item()
    assert loss(same, same).item() == pytest.approx(entropy)
    assert loss(logits(2, 6), same).item() > entropy


def test_autocast_rounds_no_logit():
    loss, student, teacher = DINO(K).eval(), logits(4, 7).float(), logits(2, 8).float()
    plain = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(student, teacher).item() == plain.item()
        assert loss(student.bfloat16(), teacher).dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: DINO(1), "at least 2"),
        (lambda: DINO(4, teacher_temperature=0.0), "above 0"),
        (lambda: DINO(4, centre_momentum=1.0), "below 1"),
        (lambda: DINO(K)(logits(1, 0), logits(1, 0)), "different views"),
        (lambda: DINO(K)(logits(2, 0), logits(3, 0)), "different views"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_cross_entropy_equals_the_loop():
    torch.manual_seed(0)
    loss = CrossEntropy(6, 4).double()
    x, y = 5 * torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4
    total = 0.0
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        scores = [
            sum(a * b for a, b in zip(w, row, strict=True)) + c
            for w, c in zip(loss.weight.tolist(), loss.bias.tolist(), strict=True)
        ]
        total -= math.log(softmax(scores)[label])
    assert loss(x, y).item() == pytest.approx(total / 9)
    assert loss(2 * x, y).item() != pytest.approx(total / 9), "lengths count"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss.float()(x.float(), y).item() == pytest.approx(total / 9, rel=1e-5)
    with pytest.raises(ValueError, match="groups"):
        loss(x.float(), y, groups=y)


# ----------------------------------------------------------------------------------------------- encoder, head, teacher


def student(*, dropout: float = 0.0, method: object = None) -> Encoder:
    torch.manual_seed(0)
    encoder = load_encoder("timm:test_vit", size=32, random_init=True)
    return adapt(encoder, method or Bottleneck(dim=4, dropout=dropout))  # type: ignore[arg-type]


def batch_at(step: int, size: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    views, crops = torch.randn(size, 2, 3, 32, 32, generator=g), torch.randn(size, 3, 3, 16, 16, generator=g)
    return {"image": views[:, 0], "views": views, "crops": crops, "label": torch.zeros(size, dtype=torch.int64)}


def objective(steps: int = 6, **settings: Any) -> SelfDistillation:  # noqa: ANN401
    torch.manual_seed(0)
    encoder = settings.pop("encoder", None) or student(dropout=settings.pop("dropout", 0.0))
    head = DINOHead(encoder.embedding_dim, K, hidden=16, bottleneck=8)
    return SelfDistillation(encoder, DINO(K), head, steps=steps, **{"small_size": (16, 16), **settings})


def test_a_second_size_has_the_same_weights():
    encoder = student()
    small = encoder.at_size((16, 16))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = small.encode_image(images)
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        after = small.encode_image(images)
        assert not torch.allclose(before, after)
    small.encode_image(images).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert encoder.encode_image(torch.randn(1, 3, 32, 32)).shape == (1, encoder.embedding_dim)
    with pytest.raises(InputError, match="pos_embed"):
        student(method=Full()).at_size((16, 16))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_takes_a_second_size(family: str, tmp_path: Path):
    encoder = adapt(FAMILIES[family](tmp_path), Bottleneck(dim=4))
    small = encoder.at_size((16, 16))
    assert small.preprocess.size == (16, 16)
    assert encoder.preprocess.size == (32, 32)
    before = small.encode_image(torch.ones(1, 3, 16, 16))
    (before * torch.randn(before.shape)).sum().backward()  # a plain sum is what a last norm takes away
    ups = [p for name, p in encoder.named_parameters() if name.endswith("bottleneck.up.weight")]
    assert len(ups) == len(encoder.anatomy.image.blocks)
    assert all(p.grad is not None and p.grad.any() for p in ups)
    with torch.no_grad():
        for parameter in ups:
            parameter.add_(torch.randn(parameter.shape))
    assert not torch.allclose(small.encode_image(torch.ones(1, 3, 16, 16)), before)
    assert sum(p.requires_grad for p in small.parameters()) == sum(p.requires_grad for p in encoder.parameters())
    if encoder.anatomy.text is not None:
        assert torch.equal(small.encode_text(["a bird"]), encoder.encode_text(["a bird"]))


def test_the_head_is_as_published():
    head = DINOHead(192, 4096)
    assert sum(p.numel() for p in head.parameters()) == 192 * 2048 + 2048 * 2049 + 2048 + 2048 * 256 + 256 + 4096 * 256
    z = torch.nn.functional.normalize(head.layers(x := torch.randn(5, 192)), dim=-1)
    assert torch.allclose(head(x), z @ torch.nn.functional.normalize(head.prototypes, dim=-1).T, atol=1e-6)


@pytest.mark.parametrize("train_head", [True, False])
def test_only_the_adapter_and_the_head_are_trained(train_head: bool):
    one = objective(train_head=train_head)
    trained = {name for name, p in one.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == ({"encoder", "head"} if train_head else {"encoder"})
    assert all(".bottleneck." in name for name in trained if name.startswith("encoder."))
    assert not any(name.startswith("small.") for name in trained)


def test_the_teacher_begins_as_the_student_and_follows_it():
    one = objective(steps=2, momentum=0.5)
    batch = batch_at(0)
    with torch.no_grad():
        own = one.head(one.encoder.encode_image(batch["views"].flatten(0, 1))).view(6, 2, K)
    assert torch.allclose(one.teach(batch), own, atol=1e-6)
    optimizer = build_optimizer("sgd", parameter_groups(one, lr=1.0))
    one.follow(optimizer)
    name = "encoder.model.blocks.0.bottleneck.up.weight"
    weight = dict(one.named_parameters())[name]
    average, expected = [], torch.zeros_like(weight)
    for step, m in ((0, 0.5), (1, 0.75)):  # 1 - 0.5 (1 + cos(pi t / 2)) / 2
        one.train()(batch_at(step))["loss"].backward()
        optimizer.step()
        expected = m * expected + (1 - m) * weight.detach()
        average.append(one.teacher.get_buffer(name.replace(".", "/")).clone())
        assert torch.allclose(average[-1], expected, atol=1e-7)
        assert average[-1].abs().sum() > 0
    own = weight.detach().clone()
    with one.as_teacher():
        assert torch.equal(weight, average[-1])
    assert torch.equal(weight, own)
    one.keep_teacher()
    assert torch.equal(weight, average[-1])


def test_the_teacher_has_no_dropout():
    one = objective(dropout=0.5).train()
    with torch.no_grad():
        for parameter in one.encoder.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    one._set({name: p.clone() for name, p in one._student().items()})
    for name, p in one._student().items():
        one.teacher.get_buffer(name.replace(".", "/")).copy_(p)
    batch = batch_at(1)
    assert torch.equal(one.teach(batch), one.teach(batch))
    assert not torch.equal(one.embed(batch), one.embed(batch))
    assert one.encoder.training


def test_the_loss_is_that_of_all_views_with_the_temperature_of_the_step():
    one = objective(steps=4, warmup=2, first_temperature=0.02)
    one.criterion.teacher_temperature = 0.04
    one.follow(torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1))
    batch = batch_at(2)
    with torch.no_grad():
        small = one.encoder.at_size((16, 16))
        found = [one.encoder.encode_image(batch["views"][:, v]) for v in range(2)]
        found += [small.encode_image(batch["crops"][:, v]) for v in range(3)]
        seen = torch.stack([one.head(x) for x in found]).double()
        for taken, temperature in ((0, 0.02), (1, 0.03), (2, 0.04), (3, 0.04)):
            one.taken.fill_(taken)
            expected = by_hand(
                seen, one.teach(batch).transpose(0, 1).double(), one.criterion.centre.tolist(), 0.1, temperature
            )
            assert one.train()(batch)["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_a_training_without_a_follower_is_an_error():
    with pytest.raises(ValueError, match="follow"):
        objective().train()(batch_at(0))
    with pytest.raises(InputError, match="multi_crop"):
        objective()({"image": torch.zeros(1, 3, 32, 32)})  # type: ignore[typeddict-item]


def test_crops_that_the_encoder_cannot_take_are_named():
    with pytest.raises(InputError, match=r"small crops of 20 x 20 \(small_size\): .*16"):
        objective(small_size=(20, 20))
    assert objective(small_size=(32, 32)).small is None, "crops of the encoder's own size need no second one"


@pytest.mark.parametrize("kind", ["one", "all"])
def test_a_collapse_is_an_error(kind: str):
    one = objective(steps=12)
    one.follow(torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1))

    class Constant(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (torch.eye(K)[0] * 9 if kind == "one" else torch.zeros(K)).expand(*x.shape[:-1], K)

    one.head = Constant()
    for step in range(9):
        one.taken.fill_(step)
        assert one.train()(batch_at(step))["information"].item() == pytest.approx(0, abs=1e-4)
    with pytest.raises(InputError, match="collapsed"):  # the tenth look
        one(batch_at(9))


# ------------------------------------------------------------------------------------------------------------- the loop


def train(one: SelfDistillation, out: Path, steps: int, until: int | None = None, **settings: str | int) -> None:
    optimizer = build_optimizer("adamw", parameter_groups(one, lr=1e-2, weight_decay=0.04))
    clip_each(optimizer, 0.3)
    one.follow(optimizer)
    schedule = warmup_cosine(optimizer, steps=steps, warmup=2, final=0.1, final_decay=0.4)

    def batches(start: int) -> Iterator[Any]:
        for step in count(start):
            if until is not None and step == until:
                raise KeyboardInterrupt
            yield batch_at(step)

    torch.manual_seed(3)
    fit(
        one,
        batches,
        optimizer,
        schedule,
        steps=steps,
        out=out,
        precision="fp32",
        clip=None,
        progress=False,
        log_every=1,
        checkpoint_every=2,
        **settings,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("method", [Bottleneck(dim=4, dropout=0.2), LoRA(rank=2)], ids=["bottleneck", "lora"])
def test_a_stopped_training_goes_on_exactly(tmp_path: Path, method: Bottleneck | LoRA):
    train(objective(8, encoder=student(method=method), warmup=4), tmp_path / "whole", 8)
    with pytest.raises(KeyboardInterrupt):
        train(objective(8, encoder=student(method=method), warmup=4), tmp_path / "stopped", 8, until=5)
    fresh = objective(8, encoder=student(method=method), warmup=4)
    train(fresh, tmp_path / "stopped", 8, resume="last")
    ends = [load_file(tmp_path / run / "checkpoints/step-00000008/weights.safetensors") for run in ("whole", "stopped")]
    assert ends[0].keys() == ends[1].keys()
    assert {"criterion.centre", "taken", "information"} <= ends[0].keys()
    assert sum(name.startswith("teacher.") for name in ends[0]) == len(fresh._student())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    assert int(ends[0]["taken"]) == 8
    rows = [json.loads(line) for line in (tmp_path / "whole" / "history.jsonl").read_text().splitlines()]
    assert {"teacher_entropy", "centre_norm", "information"} <= rows[-1].keys()
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_micro_batches_have_the_gradients_of_the_whole(tmp_path: Path):
    ends = []
    for name, settings in (("whole", {}), ("parts", {"micro_batch": 4})):
        one = objective(3, momentum=0.5)
        train(one, tmp_path / name, 3, **settings)
        ends.append({key: value.detach().clone() for key, value in one.state_dict().items()})
    for key, value in ends[0].items():
        assert torch.allclose(value, ends[1][key], atol=1e-5), key


def test_rates_and_decays_go_where_they_should():
    weights = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))]
    groups = [{"params": weights[:1], "weight_decay": 0.04}, {"params": weights[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = warmup_cosine(optimizer, steps=4, final=0.2, final_decay=0.4)
    seen = []
    for _ in range(5):
        seen.append((optimizer.param_groups[0]["lr"], *(group["weight_decay"] for group in optimizer.param_groups)))
        optimizer.step()
        schedule.step()
    rates, decays, none = zip(*seen, strict=True)
    assert rates == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(5)])
    assert decays == pytest.approx([0.4 - 0.18 * (1 + math.cos(math.pi * t / 4)) for t in range(5)])
    assert set(none) == {0.0}
    constant = warmup_cosine(torch.optim.SGD([weights[0]], lr=3.0), steps=4, final=1.0)
    constant.optimizer.step()
    constant.step()
    assert constant.get_last_lr() == [3.0]


def run_processes(out: Path, processes: int) -> list[dict[str, Any]]:
    out.mkdir()
    started(WORKER, out, processes=processes)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_have_the_centre_and_the_teacher_of_one(tmp_path: Path):
    (alone,) = run_processes(tmp_path / "one", 1)
    both = run_processes(tmp_path / "two", 2)
    assert alone["buffers"]["criterion.centre"].norm() > 0
    for kind in ("weights", "buffers"):
        for name, value in alone[kind].items():
            assert torch.equal(both[0][kind][name], both[1][kind][name]), name
            assert torch.allclose(both[0][kind][name], value, atol=2e-5), name
