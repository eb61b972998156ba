"""SemanticProxies: proxies from images and class prompts, a row-sparse Adam for these, and a resume that is exact."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vicinal.models.adapters import BitFit, LinearHead, VisualPrompt, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.training.checkpoint import trained_state
from vicinal.training.loop import fit
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.training.semantic_proxies import EMAAccumulator, GRUAccumulator, PromptTable, RowAdam, SemanticProxies
from vicinal.types import Batch, InputError

CLASSES, DIM = 5, 16
WHERE = pytest.mark.parametrize("mapped", [False, True], ids=["buffer", "file"])


@pytest.fixture(scope="module")
def original() -> Encoder:
    torch.manual_seed(0)
    return load_encoder("timm:test_vit", size=32, random_init=True)


def make(
    original: Encoder,
    *,
    prompts: VisualPrompt | None = None,
    folder: Path | None = None,
    seed: int = 1,
    ema: bool = False,
) -> SemanticProxies:
    torch.manual_seed(seed)
    encoder = adapt(original, VisualPrompt(tokens=2), BitFit(), LinearHead(dim=DIM))
    accumulator = EMAAccumulator() if ema else GRUAccumulator(DIM, dropout=0.1)
    return SemanticProxies(
        encoder, CLASSES, prompts or VisualPrompt(tokens=3, depth=2, decrement=1), accumulator, folder=folder
    )


def batch_at(step: int, size: int = 8) -> Batch:
    """Noisy images of five classes, in any order, some more than once."""
    means = torch.randn(CLASSES, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(step)
    label = torch.randint(CLASSES, (size,), generator=g)
    return {"image": means[label] + 0.5 * torch.randn(size, 3, 32, 32, generator=g), "label": label}


def batches(start: int) -> Iterator[Batch]:
    for t in count(start):
        yield batch_at(t)


def optimise(objective: SemanticProxies, *, lr: float = 3e-3) -> RowAdam:
    return RowAdam(build_optimizer("adamw", parameter_groups(objective, lr=lr)), objective.table, lr=lr)


# ------------------------------------------------------------------------------------------------------- accumulators


def gru_by_hand(gru: GRUAccumulator, stored: Tensor, proxies: Tensor, classes: Tensor) -> Tensor:
    """One item at a time, gate by gate, in float64."""
    w_z, w_r, w_n = gru.input.weight.double().chunk(3)
    b_z, b_r, b_n = gru.input.bias.double().chunk(3)
    u_z, u_r, u_n = gru.hidden.weight.double().chunk(3)
    state = stored.double().clone()
    for p, c in zip(proxies.double(), classes.tolist(), strict=True):
        h = state[c].clone()
        z = torch.sigmoid(w_z @ p + u_z @ h + b_z)
        r = torch.sigmoid(w_r @ p + u_r @ h + b_r)
        n = torch.clamp(w_n @ p + r * (u_n @ h) + b_n, min=0)
        state[c] = (1 - z) * n + z * h
    return state / state.norm(dim=1, keepdim=True)


def rows(count: int, dim: int = DIM, seed: int = 5) -> Tensor:
    return nn.functional.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


TWICE = torch.tensor([2, 0, 2, 3, 0, 2])  # three of class 2, none of 1, not side by side


@torch.no_grad()
def test_gru_takes_the_items_of_a_class_in_turn_wherever_they_stand():
    torch.manual_seed(0)
    gru, stored, proxies = GRUAccumulator(DIM), rows(4), rows(6, seed=6)
    nn.init.normal_(gru.input.bias)
    got = gru(stored, proxies, TWICE)
    torch.testing.assert_close(got, gru_by_hand(gru, stored, proxies, TWICE).float())
    torch.testing.assert_close(got[1], stored[1])
    by_class = TWICE.argsort(stable=True)
    assert torch.equal(gru(stored, proxies[by_class], TWICE[by_class]), got)
    assert not torch.allclose(gru(stored, proxies.flip(0), TWICE.flip(0)), got)  # within a class, their order counts


def test_gru_starts_as_the_paper_s():
    gru = GRUAccumulator(64)
    bound = (6 / (64 + 64)) ** 0.5  # Xavier of each gate, not of the three in one
    for weight in (gru.input.weight, gru.hidden.weight):
        assert 0.95 * bound < weight.abs().max().item() <= bound
    assert not gru.input.bias.any()


def test_gru_keeps_the_share_that_it_is_told_to_before_it_has_learnt():
    gru = GRUAccumulator(DIM, keep=0.9)
    torch.testing.assert_close(torch.sigmoid(gru.input.bias[:DIM]), torch.full((DIM,), 0.9))
    assert not gru.input.bias[DIM:].any()
    with torch.no_grad():
        for parameter in (gru.input.weight, gru.hidden.weight):
            parameter.zero_()
        gru.input.bias[2 * DIM :] = 1.0  # of the candidate
    found = gru(rows(1), rows(2)[:1], torch.tensor([0]))
    expected = 0.9 * rows(1) + 0.1
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    for keep in (0.0, 1.0):
        with pytest.raises(ValueError, match="keep is a share, between 0 and 1"):
            GRUAccumulator(DIM, keep=keep)


def test_ema_is_the_mean_mixed_in_and_does_not_care_for_order():
    ema, stored, proxies = EMAAccumulator(keep=0.7), rows(4), rows(6, seed=6)
    expected = stored.double().clone()
    for c in (0, 2, 3):
        expected[c] = 0.7 * expected[c] + 0.3 * proxies[c == TWICE].double().mean(0)
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(ema(stored, proxies, TWICE), expected.float())
    turned = torch.tensor([3, 5, 0, 1, 4, 2])
    torch.testing.assert_close(ema(stored, proxies[turned], TWICE[turned]), expected.float())


# -------------------------------------------------------------------------------------------------- table and optimiser


def table_at(folder: Path | None, classes: int = 4, seed: int = 3) -> PromptTable:
    return PromptTable(classes, 2, 3, folder=folder, seed=seed)


@WHERE
def test_each_row_is_stepped_as_by_an_adam_of_its_own(mapped: bool, tmp_path: Path):
    table = table_at(tmp_path if mapped else None)
    dense = [nn.Parameter(row[:6].clone().view(2, 3)) for row in table.table]
    alone = [torch.optim.Adam([row], lr=0.1) for row in dense]
    optimizer = RowAdam(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), table, lr=0.1)
    g = torch.Generator().manual_seed(0)
    for step, classes in enumerate([[1, 0], [2, 1], [1], [0, 2, 1], [1, 2], [2]] * 4):
        lr = optimizer.param_groups[-1]["lr"] = 0.1 / (1 + step)
        target = torch.randn(4, 2, 3, generator=g)
        (table(torch.tensor(classes)) * target[classes]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for c in classes:
            alone[c].param_groups[0]["lr"] = lr
            alone[c].zero_grad()
            (dense[c] * target[c]).square().sum().backward()
            alone[c].step()
    torch.testing.assert_close(
        table.table[:, :6], torch.stack([row.detach().flatten() for row in dense]), rtol=1e-5, atol=1e-7
    )
    assert table.table[:, -1].tolist() == [8, 20, 16, 0]
    assert torch.equal(table.table[3], table_at(None).table[3])  # never drawn: as it began


def test_parts_of_one_step_that_share_a_class_have_their_gradients_summed():
    one, two = table_at(None), table_at(None)
    for table, parts in ((one, [[0, 2, 1]]), (two, [[0, 2], [2, 1]])):
        optimizer = RowAdam(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), table, lr=0.1)
        for _ in range(2):
            share = torch.tensor([1.0, 1.0, 1.0, 1.0]) if len(parts) == 1 else torch.tensor([1.0, 1.0, 0.5, 1.0])
            for part in parts:
                (table(torch.tensor(part)).square().sum((1, 2)) * share[part]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(one.table, two.table)


def test_a_loss_scaler_finds_the_gradients():
    plain, scaled = table_at(None), table_at(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    other = nn.Parameter(torch.ones(2))
    for table in (plain, scaled):
        optimizer = RowAdam(torch.optim.SGD([other], lr=0.0), table, lr=0.1)
        for factor in (1.0, 3.0):
            loss = factor * (table(torch.tensor([2, 1])).sum() + other.sum())
            if table is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    assert torch.equal(plain.table, scaled.table)
    assert plain.table[:, -1].tolist() == [0, 2, 2, 0]


def test_the_schedule_sets_the_rate_of_both():
    objective = table_at(None)
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    optimizer = RowAdam(inner, objective, lr=1.0)
    schedule = warmup_cosine(optimizer, steps=8, warmup=4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert inner.param_groups[0]["lr"] == 0.5
    state = optimizer.state_dict()
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    optimizer.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert inner.param_groups[0] is optimizer.param_groups[0]


def test_file_and_buffer_begin_alike(tmp_path: Path):
    table = table_at(tmp_path, classes=700_000)  # drawn in several goes
    assert torch.equal(table.table, table_at(None, classes=700_000).table)
    assert table.table[:, :6].std().item() == pytest.approx(0.02, rel=1e-2)
    assert not table.table[:, 6:].any()
    assert (tmp_path / "class_prompts.bin").stat().st_size == 700_000 * 19 * 4
    assert not list(table.buffers())


def test_what_is_too_large_is_refused_before_it_is_made(tmp_path: Path):
    with pytest.raises(InputError, match=r"3,997 classes.* 17\.7 GB .*max_bytes, 2\.1 GB"):
        PromptTable(3997, 12 * 80, 384, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    size = 4 * 4 * 19
    assert PromptTable(4, 2, 3, max_bytes=size).table.numel() * 4 == size
    with pytest.raises(InputError, match="max_bytes"):
        PromptTable(4, 2, 3, max_bytes=size - 1)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate here")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="No space left"):
        table_at(tmp_path)
    assert not list(tmp_path.iterdir())


def test_copies_of_the_file_are_two_and_the_missing_is_said(tmp_path: Path):
    table = table_at(tmp_path)
    optimizer = RowAdam(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), table, lr=0.1)
    states, tables = [], []
    for _ in range(3):
        table(torch.tensor([2, 1])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(optimizer.state_dict())
        tables.append(table.table.clone())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["class_prompts-00000002.bin", "class_prompts-00000003.bin", "class_prompts.bin"]
    optimizer.load_state_dict(states[1])
    assert torch.equal(table.table, tables[1])
    assert not torch.equal(table.table, tables[2])
    with pytest.raises(InputError, match=r"class_prompts-00000001\.bin.*go on from the last"):
        optimizer.load_state_dict(states[0])
    other = RowAdam(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), table_at(tmp_path, classes=5), lr=0.1)
    with pytest.raises(InputError, match="of other classes"):
        other.load_state_dict(states[1])


def test_prompts_that_nothing_trains_are_found_out(original: Encoder):
    objective = make(original)
    objective(batch_at(0))["loss"].backward()
    with pytest.raises(ValueError, match="RowAdam"):
        objective(batch_at(1))


# ------------------------------------------------------------------------------------------------------- the objective


def test_the_golden_value_of_proxy_anchor(original: Encoder):
    objective = make(original).eval()
    objective.share = 1.0
    s = torch.tensor([[0.2, 0.1, -0.3], [0.05, 0.3, 0.0], [0.1, 0.0, 0.2], [-0.1, 0.15, 0.1]])
    x = torch.zeros(4, DIM)
    x[:, :3], x[:, 3] = s, (1 - s.square().sum(1)).sqrt()
    objective.criterion.weight.data = torch.eye(DIM)[:3]
    objective.stored = rows(3)
    loss = objective.loss(torch.stack([x, rows(4)], 1), {"label": torch.tensor([0, 0, 1, 1])})
    assert loss["loss"].item() == pytest.approx(12.134808567, rel=1e-6)


def test_the_proxies_are_a_mix_of_learnt_of_present_and_of_stored(original: Encoder, monkeypatch: pytest.MonkeyPatch):
    objective = make(original).eval()
    objective.share = 0.3
    embeddings = torch.randn(4, 2, DIM, generator=torch.Generator().manual_seed(2))
    label = torch.tensor([3, 0, 3, 1])
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "vicinal.training.semantic_proxies.proxy_anchor",
        lambda x, y, proxies, **_: seen.append(proxies) or proxies.sum(),  # type: ignore[func-returns-value]
    )
    objective.loss(embeddings, {"label": label})
    unit = embeddings[:, 1].double() / embeddings[:, 1].double().norm(dim=1, keepdim=True)
    assert isinstance(objective.accumulator, GRUAccumulator)
    known = gru_by_hand(objective.accumulator, objective.stored, unit, label)
    expected = 0.3 * objective.criterion.weight.double() + 0.7 * known
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(seen[0], expected.float())
    assert objective.criterion.weight.norm(dim=1).mean().item() < 0.5


def test_what_is_accumulated_can_begin_with_class_means(original: Encoder):
    objective = make(original)
    before = objective.stored.clone()
    vectors = torch.randn(6, DIM, generator=torch.Generator().manual_seed(2))
    objective.start_from_class_means(vectors, torch.tensor([0, 2, 2, 0, 3, 2]))
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    for c, own in {0: [0, 3], 2: [1, 2, 5], 3: [4]}.items():
        expected = unit[own].sum(0)
        torch.testing.assert_close(objective.stored[c], expected / expected.norm())
    torch.testing.assert_close(objective.stored[[1, 4]], before[[1, 4]])


def test_each_image_gets_the_prompts_of_its_class(original: Encoder):
    objective, batch = make(original).eval(), batch_at(3)
    nn.init.normal_(objective.table.table[:, : 5 * 64])
    nn.init.normal_(objective.head[1].weight)
    assert objective.counts == [3, 2]
    embeddings = objective.embed(batch)
    for i, c in enumerate(batch["label"].tolist()):
        image = batch["image"][i : i + 1]
        prompts = objective.table.table[c, : 5 * 64].view(1, 5, 64)
        alone = objective.encoder.encode_tokens(
            objective.encoder.patch_tokens(image), [prompts[:, :3], prompts[:, 3:]], head=objective.head
        )
        torch.testing.assert_close(embeddings[i, 1], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embeddings[:, 0], objective.encoder.encode_image(batch["image"]))


def test_patches_are_embedded_once(original: Encoder):
    objective, calls = make(original), []
    patch_embed = objective.encoder.model.get_submodule(objective.encoder.anatomy.patch_embed)
    patch_embed.register_forward_hook(lambda *_: calls.append(1))
    objective(batch_at(0))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("prompts", "counts", "carried"),
    [
        (VisualPrompt(tokens=2, depth="shallow"), [2], 5),
        (VisualPrompt(tokens=2, depth="deep", dropout=0.5), [2] * 6, 0),
    ],
    ids=["shallow", "deep"],
)
def test_prompts_shallow_and_deep(original: Encoder, prompts: VisualPrompt, counts: list[int], carried: int):
    objective = make(original, prompts=prompts)
    assert (objective.counts, objective.carried) == (counts, carried)
    objective(batch_at(0))["loss"].backward()
    gradient = objective.table.leaves[0].grad
    assert gradient is not None
    assert gradient.abs().sum((1, 2)).gt(0).all()


def test_more_blocks_than_there_are_is_refused(original: Encoder):
    with pytest.raises(InputError, match=r"prompts in 7 blocks, but .* has 6"):
        make(original, prompts=VisualPrompt(depth=7))


def test_settings_out_of_range_are_refused(original: Encoder):
    with pytest.raises(ValueError, match="keep"):
        EMAAccumulator(keep=1.0)
    with pytest.raises(ValueError, match="dropout"):
        GRUAccumulator(DIM, dropout=1.0)
    with pytest.raises(ValueError, match="share"):
        SemanticProxies(original, CLASSES, VisualPrompt(), share=1.1)


def test_the_encoder_is_whole_without_its_proxies(original: Encoder, tmp_path: Path):
    objective, batch = make(original), batch_at(2)
    optimizer = optimise(objective)
    objective.train()(batch)["loss"].backward()
    optimizer.step()
    saved = load_encoder(str(objective.eval().encoder.save(tmp_path / "model")))
    with torch.no_grad():
        torch.testing.assert_close(saved.eval().encode_image(batch["image"]), objective.embed(batch)[:, 0])


def test_every_part_gets_a_gradient_and_absent_classes_only_their_learnt_proxy(original: Encoder):
    objective = make(original).train()
    batch = batch_at(0)
    batch["label"] = torch.tensor([3, 1, 3, 3, 1, 1, 3, 1])
    before = objective.stored.clone()
    objective(batch)["loss"].backward()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert objective.criterion.weight.grad is not None
    assert objective.criterion.weight.grad.abs().sum(1).gt(0).all()
    assert objective.table.classes[0].tolist() == [1, 3]
    moved = (objective.stored != before).any(1)
    assert moved.tolist() == [False, True, False, True, False]
    torch.testing.assert_close(objective.stored.norm(dim=1), torch.ones(CLASSES))
    assert not objective.stored.requires_grad


def test_measuring_remembers_nothing(original: Encoder):
    objective = make(original).eval()
    before = {name: value.clone() for name, value in trained_state(objective).items()}
    with torch.no_grad():
        first, second = (objective(batch_at(0))["loss"] for _ in range(2))
    assert torch.equal(first, second)
    assert not objective.table.leaves
    assert all(torch.equal(before[name], value) for name, value in trained_state(objective).items())


def test_the_order_of_the_batch_does_not_matter(original: Encoder):
    objective, batch = make(original, ema=True).eval(), batch_at(4)
    turned = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    other: Batch = {"image": batch["image"][turned], "label": batch["label"][turned]}
    torch.testing.assert_close(objective(batch)["loss"], objective(other)["loss"], rtol=1e-5, atol=1e-5)
    objective = make(original).eval()
    by_class = batch["label"].argsort(stable=True)
    other = {"image": batch["image"][by_class], "label": batch["label"][by_class]}
    torch.testing.assert_close(objective(batch)["loss"], objective(other)["loss"], rtol=1e-5, atol=1e-5)


def test_several_processes_are_refused(original: Encoder, monkeypatch: pytest.MonkeyPatch):
    objective = make(original)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="one process"):
        objective.embed(batch_at(0))


# -------------------------------------------------------------------------------------------------------- in the loop


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "history.jsonl").read_text().splitlines()]


def train(objective: SemanticProxies, out: Path, *, stop: int = 8, resume: str | None = None) -> None:
    """Eight steps as planned, of which the first `stop` are taken."""
    optimizer = optimise(objective)
    schedule = warmup_cosine(optimizer, steps=8, warmup=2)
    settings = {"clip": 1.0, "accumulate": 2, "checkpoint_every": 2, "log_every": 1}
    torch.manual_seed(11)
    fit(
        objective, batches, optimizer, schedule, steps=stop, out=out, resume=resume, progress=False,
        precision="fp32", **settings,  # type: ignore[arg-type]
    )  # fmt: skip


@WHERE
def test_a_resumed_training_is_bit_by_bit_the_one_that_was_not_stopped(original: Encoder, mapped: bool, tmp_path: Path):
    folders = {name: tmp_path / name / "table" if mapped else None for name in ("whole", "parts")}
    whole = make(original, folder=folders["whole"])
    train(whole, tmp_path / "whole")
    first = make(original, folder=folders["parts"])
    train(first, tmp_path / "parts", stop=4)
    if mapped:  # as a killed run leaves it: the file is ahead of the checkpoint
        first.table.table.add_(1.0)
    second = make(original, folder=folders["parts"], seed=2)
    train(second, tmp_path / "parts", resume="last")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 8
    assert torch.equal(whole.table.table, second.table.table)
    assert whole.table.table[:, -1].max() > 4
    ours, theirs = trained_state(second), trained_state(whole)
    assert "stored" in ours
    assert ("table.table" in ours) is not mapped
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("ema", [False, True], ids=["gru", "ema"])
def test_a_small_training(original: Encoder, ema: bool, tmp_path: Path):
    objective = make(original, ema=ema)
    optimizer = optimise(objective)
    began = objective.table.table.clone()
    result = fit(
        objective,
        batches,
        optimizer,
        warmup_cosine(optimizer, steps=80, warmup=2),
        steps=80,
        progress=False,
        precision="fp32",
    )
    assert result.history[-1]["loss"] < 0.6 * result.history[0]["loss"]
    assert (objective.table.table[:, -1] > 5).all()
    assert ((objective.table.table - began)[:, : 5 * 64].abs().amax(1) > 1e-3).all()
