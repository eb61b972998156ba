"""A batch is a function of seed and step: with any number of workers, from any start, whatever else draws numbers."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from pictures import write_folder
from vicinal.data import loader
from vicinal.data.loader import EvalBatches, TrainBatches, eval_batches, train_batches
from vicinal.data.manifest import Manifest
from vicinal.data.samplers import PKSampler, ShuffleSampler
from vicinal.data.transforms import AUGMENT, eval_transform, multi_crop, train_transform
from vicinal.types import Batch, InputError, Preprocess

PREPROCESS = Preprocess((24, 24), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """30 JPEGs of 5 classes, with texts and groups."""
    root = write_folder(tmp_path_factory.mktemp("photos"), classes=5, each=6, suffix=".jpg")
    files = sorted(root.rglob("*.jpg"))
    table = {
        "image": [file.relative_to(root).as_posix() for file in files],
        "label": [file.parent.name for file in files],
        "text": [f"picture {i}" if i % 3 else None for i in range(len(files))],
        "group": [f"g{i % 4}" if i % 5 else None for i in range(len(files))],
    }
    return Manifest.build(table, root)


@pytest.fixture
def broken(photos: Manifest, tmp_path: Path) -> Manifest:
    """The same with row 7 cut short, row 20 missing, and every picture of the last class gone."""
    for row in range(len(photos)):
        target = tmp_path / photos.column("image")[row]
        target.parent.mkdir(exist_ok=True)
        data = photos.path(row).read_bytes()
        if row != 20 and row < 24:
            target.write_bytes(data[: len(data) // 2] if row == 7 else data)
    return Manifest.build(photos.table, tmp_path)


def taken(batches: Iterable[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def train(manifest: Manifest, augment: str = "standard", *, k: int = 2, **options: object) -> TrainBatches:
    sampler = PKSampler(manifest.labels(), classes=3, images_per_class=k, seed=0)
    return train_batches(manifest, train_transform(PREPROCESS, augment), sampler, **{"seed": 5, "workers": 0} | options)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x["image"], y["image"]) and torch.equal(x["index"], y["index"]) for x, y in zip(a, b, strict=True)
    )


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", AUGMENT)
def test_workers_change_nothing(photos: Manifest, augment: str) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # a worker has one
        alone = taken(train(photos, augment), 7)
    finally:
        torch.set_num_threads(threads)
    assert same(alone, taken(train(photos, augment, workers=1), 7))
    assert same(alone, taken(train(photos, augment, workers=2), 7))


@pytest.mark.parametrize("workers", [0, 2])
def test_restart_at_any_step(photos: Manifest, workers: int) -> None:
    length = len(PKSampler(photos.labels(), classes=3, images_per_class=2, seed=0))
    assert length == 5
    whole = taken(train(photos), 14)
    for start in (1, 4, 5, 6, 12):
        assert same(taken(train(photos, start_step=start, workers=workers), 2), whole[start : start + 2])


def test_restart_where_rows_come_twice_in_an_epoch(photos: Manifest) -> None:
    whole = taken(train(photos, k=4), 6)
    epoch = torch.cat([batch["index"] for batch in whole[:2]])
    assert epoch.unique().numel() < epoch.numel()
    for start in range(1, 5):
        assert same(taken(train(photos, k=4, start_step=start), 2), whole[start : start + 2])


def test_a_restart_does_not_make_the_batches_before_it(photos: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = loader._Maker.view
    monkeypatch.setattr(loader._Maker, "view", lambda self, row, seed: made.append(row) or original(self, row, seed))
    taken(train(photos, start_step=10_003), 1)
    assert len(made) == 6


def test_seed_and_epoch_change_everything(photos: Manifest) -> None:
    one, other = taken(train(photos, seed=5), 1)[0], taken(train(photos, seed=6), 1)[0]
    assert torch.equal(one["index"], other["index"])  # the sampler's seed is its own
    assert not any(torch.equal(a, b) for a, b in zip(one["image"], other["image"], strict=True))
    # The same row in two epochs.
    rows: dict[int, list[Tensor]] = {}
    for batch in taken(train(photos), 15):
        for row, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            rows.setdefault(row, []).append(image)
    assert len(rows) == 30
    assert all(not torch.equal(a, b) for views in rows.values() for a, b in itertools.combinations(views, 2))


def test_a_row_that_repeats_is_seen_anew(photos: Manifest) -> None:
    few = photos.where([i % 6 == 0 for i in range(len(photos))])  # classes of one
    batch = taken(train(few, k=4), 1)[0]
    assert batch["index"].unique().numel() == 3
    views = batch["image"].flatten(1).unflatten(0, (3, 4))
    assert all(not torch.equal(a, b) for group in views for a, b in itertools.combinations(group, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_neither_read_nor_moved(photos: Manifest, workers: int) -> None:
    torch.manual_seed(0)
    first, state = taken(train(photos, workers=workers), 3), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert same(first, taken(train(photos, workers=workers), 3))


def test_what_a_batch_holds(photos: Manifest) -> None:
    batch = taken(train(photos), 1)[0]
    rows = batch["index"].tolist()
    assert batch["image"].shape == (6, 3, 24, 24)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["label"], photos.labels()[rows])
    assert batch["text"] == [photos.column("text")[row] or "" for row in rows]
    groups = photos.column("group")
    for (a, i), (b, j) in itertools.product(zip(rows, batch["group"].tolist(), strict=True), repeat=2):
        assert (i == j) == (a == b or (groups[a] is not None and groups[a] == groups[b]))


def test_a_caption_is_drawn_for_each_look_and_does_not_depend_on_the_workers(photos: Manifest) -> None:
    several = [[f"{i} a", f"{i} b", f"{i} c"] if i % 4 else [] for i in range(len(photos))]
    captioned = replace(photos, table=photos.table.append_column("captions", pa.array(several)))
    batches = taken(train(captioned), 150)
    seen: dict[int, set[str]] = {}
    for batch in batches:
        for row, text in zip(batch["index"].tolist(), batch["text"], strict=True):
            seen.setdefault(row, set()).add(text)
    assert seen == {row: set(captioned.captions()[row]) or {""} for row in range(len(photos))}
    assert captioned.captions()[1] == ["picture 1", "1 a", "1 b", "1 c"]
    assert [b["text"] for b in taken(train(captioned, workers=2), 5)] == [b["text"] for b in batches[:5]]
    assert [b["text"] for b in taken(train(captioned, start_step=3), 2)] == [b["text"] for b in batches[3:5]]
    evaluated = next(iter(eval_batches(captioned, eval_transform(PREPROCESS), batch_size=8)))
    assert captioned.captions()[3] == ["3 a", "3 b", "3 c"]
    assert evaluated["text"] == [(told or [""])[0] for told in captioned.captions()[:8]]


def test_a_mixed_seed_has_no_collisions() -> None:
    seeds = {
        loader.mixed(seed, epoch, row, n) & 0xFFFFFFFF  # all that torch's generator takes of it
        for seed, epoch, row, n in itertools.product(range(4), range(10), range(40), range(2))
    }
    assert len(seeds) == 4 * 10 * 40 * 2


def test_shares_of_ranks_make_the_batch(photos: Manifest) -> None:
    whole = taken(train(photos, start_step=2), 4)
    ranks = [taken(train(photos, start_step=2, rank=rank, world_size=2, workers=rank), 4) for rank in range(2)]
    for step, batch in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert [len(share["index"]) for share in shares] == [3, 3]
        assert torch.equal(torch.cat([share["image"] for share in shares]), batch["image"])
    with pytest.raises(InputError, match="7 processes"):
        taken(train(photos, rank=3, world_size=7), 1)


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(manifest: Manifest, **options: object) -> EvalBatches:
    return eval_batches(manifest, eval_transform(PREPROCESS), **{"batch_size": 7, "workers": 0} | options)


@pytest.mark.parametrize("workers", [0, 2, None])
def test_every_row_once_in_order(photos: Manifest, workers: int | None) -> None:
    batches = evaluate(photos, workers=workers)
    assert len(batches) == 5
    for _ in range(2):  # it can be iterated again
        found = list(batches)
        assert [len(batch["index"]) for batch in found] == [7, 7, 7, 7, 2]
        assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(30))
        expected = torch.stack([eval_transform(PREPROCESS)(photos.image(row)) for row in range(30)])
        assert torch.equal(torch.cat([batch["image"] for batch in found]), expected)
    assert batches.skipped == []


def test_a_function_is_a_transform(photos: Manifest) -> None:
    batches = eval_batches(photos, lambda image: image[:, :5, :4].float(), batch_size=30, workers=0)
    expected = torch.stack([photos.image(row)[:, :5, :4].float() for row in range(30)])
    assert torch.equal(next(iter(batches))["image"], expected)


def test_large_photos_are_decoded_smaller_and_boxes_are_cut(tmp_path: Path) -> None:
    gradient = Image.linear_gradient("L").resize((900, 700)).convert("RGB")
    gradient.save(tmp_path / "large.jpg", quality=95)
    boxes = [(100.0, 50.0, 500.0, 450.0), None, (100.0, 250.0, 500.0, 650.0)]
    manifest = Manifest.build({"image": ["large.jpg"] * 3, "label": ["x"] * 3, "box": boxes}, tmp_path, padding=0.1)
    batch = next(iter(evaluate(manifest)))
    for row in range(3):
        full = manifest.image(row)
        assert full.shape[1:] == ((700, 900) if boxes[row] is None else (480, 480))
        expected = eval_transform(PREPROCESS)(full)
        assert (batch["image"][row] - expected).abs().max() < 0.02
    assert batch["image"][0].mean() < batch["image"][2].mean() - 0.3


def test_an_empty_manifest_has_no_batches(photos: Manifest) -> None:
    assert list(evaluate(photos.where([False] * 30))) == []


# --- what cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reads_like_one_here(broken: Manifest, workers: int) -> None:
    culprit = broken.path(7).name
    with pytest.raises(InputError, match=culprit) as caught:
        list(evaluate(broken, workers=workers))
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).count("\n") == 0
    with pytest.raises(InputError, match=r"\.jpg"):
        taken(train(broken, workers=workers), 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_what_cannot_be_read(broken: Manifest, workers: int) -> None:
    batches = evaluate(broken, workers=workers, batch_size=3, on_error="skip")
    found = list(batches)
    gone = [7, 20, *range(24, 30)]
    assert torch.cat([batch["index"] for batch in found]).tolist() == [row for row in range(30) if row not in gone]
    assert [len(batch["image"]) for batch in found] == [3, 3, 2, 3, 3, 3, 2, 3]  # the two empty ones are not there
    assert [name for name, _ in batches.skipped] == [broken.ids()[row] for row in gone]
    assert "decoded" in batches.skipped[0][1]
    assert "no such file" in batches.skipped[1][1]


def test_training_takes_another_of_the_class(broken: Manifest) -> None:
    alone = train(broken, on_error="skip")
    reference = taken(train(broken.where([i < 24 for i in range(30)]), on_error="skip", workers=2), 0)
    assert reference == []
    found = taken(alone, 15)
    assert same(found, taken(train(broken, on_error="skip", workers=2), 15))
    assert same(found[9:12], taken(train(broken, on_error="skip", start_step=9), 3))
    sampler = PKSampler(broken.labels(), classes=3, images_per_class=2, seed=0)
    plan = [batch for epoch in range(3) for batch in sampler.epoch(epoch)]
    labels, gone = broken.labels(), {7, 20, *range(24, 30)}
    assert any(gone & set(batch) for batch in plan)
    for batch, rows in zip(found, plan, strict=True):
        expected = [row for row in rows if row < 24]  # nothing can stand in for the last class
        assert batch["label"].tolist() == labels[expected].tolist()
        for row, planned in zip(batch["index"].tolist(), expected, strict=True):
            assert row == planned if planned not in gone else row not in gone
    assert {name for name, _ in alone.skipped} == {broken.ids()[row] for row in gone}


def test_training_on_nothing_readable_ends(photos: Manifest, tmp_path: Path) -> None:
    nowhere = Manifest.build(photos.table, tmp_path)
    with pytest.raises(InputError, match="no image can be read"):
        taken(train(nowhere, on_error="skip"), 1)


def test_a_bug_in_a_transform_keeps_its_trace(photos: Manifest) -> None:
    with pytest.raises(ZeroDivisionError):
        list(eval_batches(photos, lambda image: image / (1 // 0), batch_size=7, workers=2))


# --- processes ------------------------------------------------------------------------------------------------------


def test_the_maker_can_be_sent_to_another_process(photos: Manifest) -> None:
    maker = loader._Maker(photos, train_transform(PREPROCESS, "logo"), "skip", loader._Spares(photos.labels().numpy()))
    items = [loader._Item(row, row) for row in range(4)]
    sent, kept = pickle.loads(pickle.dumps(maker))[items].images, maker[items].images
    assert torch.equal(sent["image"], kept["image"])


def test_default_workers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 1), (4, 3), (64, 8)):
        monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert loader.default_workers() == expected


@pytest.mark.slow
def test_spawned_workers(photos: Manifest, tmp_path: Path) -> None:
    """As on macOS and Windows, where a worker begins from nothing but what it is sent."""
    photos.save(tmp_path / "photos.parquet")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from vicinal.data.loader import train_batches\n"
        "from vicinal.data.manifest import Manifest\n"
        "from vicinal.data.samplers import ShuffleSampler\n"
        "from vicinal.data.transforms import train_transform\n"
        "from vicinal.types import Preprocess\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.set_start_method('spawn')\n"
        "    photos = Manifest.load(sys.argv[1])\n"
        "    transform = train_transform(Preprocess((24, 24), (0.5,) * 3, (0.5,) * 3), 'logo')\n"
        "    sampler = ShuffleSampler(len(photos), 8, seed=0)\n"
        "    batch = next(train_batches(photos, transform, sampler, seed=1, workers=1))\n"
        "    torch.save(batch['image'], sys.argv[2])\n"
    )
    subprocess.run([sys.executable, script, tmp_path / "photos.parquet", tmp_path / "image.pt"], check=True)
    transform = train_transform(PREPROCESS, "logo")
    expected = next(train_batches(photos, transform, ShuffleSampler(30, 8, seed=0), seed=1, workers=0))["image"]
    assert torch.equal(torch.load(tmp_path / "image.pt", weights_only=True), expected)


# --- several views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_several_views_come_by_name(photos: Manifest, workers: int) -> None:
    transform = multi_crop(PREPROCESS, small_crops=3, small_size=(16, 16))
    stream = train_batches(photos, transform, ShuffleSampler(len(photos), 4, seed=0), seed=0, workers=workers)
    batch = next(stream)
    assert batch["views"].shape == (4, 2, 3, *PREPROCESS.size)
    assert batch["crops"].shape == (4, 3, 3, 16, 16)
    assert torch.equal(batch["image"], batch["views"][:, 0])
    again = next(train_batches(photos, transform, ShuffleSampler(len(photos), 4, seed=0), seed=0, workers=0))
    assert all(torch.equal(batch[name], again[name]) for name in ("views", "crops", "label", "index"))
