"""Streams of shards: their order, what every reader gets, broken shards, a web server, and going on at any batch."""

from __future__ import annotations

import gzip
import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from pictures import write_folder
from test_data_shards import jpeg, pack, plain
from vicinal.data import shards as room
from vicinal.data.shards import read_shards, write_shards
from vicinal.data.sources import read_folder
from vicinal.data.stream import StreamBatches, stream_batches, stream_once
from vicinal.data.transforms import eval_transform, train_transform
from vicinal.types import InputError, Preprocess

SMALL = Preprocess(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SIZES = (7, 3, 9, 5, 6)  # samples of the shards: 30, and no two alike


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    start = 0
    for number, size in enumerate(SIZES):
        pack(folder / f"{number}.tar", plain(size, start))
        start += size
    return folder


def stream(shards: Path | str, **more: Any) -> StreamBatches:  # noqa: ANN401
    settings = {"batch_size": 4, "seed": 1, "shuffle": 6, "workers": 0} | more
    return stream_batches(f"{shards}/{{0..4}}.tar", eval_transform(SMALL), **settings)


def texts(batches: Iterator[Any], count: int) -> list[list[str]]:
    return [batch["text"] for batch in islice(batches, count)]


def flat(several: Iterable[list[str]]) -> list[str]:
    return list(chain.from_iterable(several))


@pytest.mark.parametrize("shuffle", [0, 6, 1000])
def test_each_sample_once_an_epoch_and_another_order_each(shards: Path, shuffle: int) -> None:
    drawn = flat(texts(stream(shards, batch_size=5, shuffle=shuffle), 18))
    epochs = [drawn[at : at + 30] for at in (0, 30, 60)]
    everything = [f"picture {i}" for i in range(30)]
    assert all(sorted(epoch, key=everything.index) == everything for epoch in epochs)
    assert (epochs[0] == everything, epochs[0] == epochs[1]) == ((True, True) if shuffle == 0 else (False, False))
    assert drawn == flat(texts(stream(shards, batch_size=5, shuffle=shuffle), 18))
    if shuffle:
        assert drawn != flat(texts(stream(shards, batch_size=5, shuffle=shuffle, seed=2), 18))


def test_unequal_shards_leave_no_process_waiting_and_lose_nothing(shards: Path) -> None:
    """Two processes of one reader each: any number of batches each, and an epoch's shares are all samples."""
    ranks = [stream(shards, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    drawn = [flat(texts(rank, 60)) for rank in ranks]
    assert [len(mine) for mine in drawn] == [60, 60]
    counts = Counter(drawn[0] + drawn[1])
    assert set(counts) == {f"picture {i}" for i in range(30)}
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (1, 2), (3, 2)])
def test_going_on_at_any_batch_is_exact(shards: Path, workers: int, world_size: int) -> None:
    settings: dict[str, Any] = {"workers": workers, "world_size": world_size, "rank": world_size - 1}
    whole = list(islice(stream(shards, **settings), 20))
    for start in (1, 7, 13):
        again = islice(stream(shards, start_step=start, **settings), 20 - start)
        for one, other in zip(again, whole[start:], strict=True):
            assert one["text"] == other["text"]
            assert torch.equal(one["image"], other["image"])


def test_more_readers_than_shards_take_turns(shards: Path) -> None:
    alone = f"{shards}/0.tar"
    for rank in range(3):
        batches = stream_batches(alone, eval_transform(SMALL), batch_size=3, seed=0, workers=0, rank=rank, world_size=3)
        assert sorted(flat(texts(batches, 7))) == sorted(f"picture {i}" for i in range(7))


def test_whole_epochs_that_are_counted_are_not_read_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = room.opened
    monkeypatch.setattr("vicinal.data.stream.opened", lambda shard: (opened.append(shard), real(shard))[1])
    uncounted = texts(stream(shards, start_step=50), 3)
    read = len(opened)
    monkeypatch.setattr("vicinal.data.stream.recorded", lambda _: {f"{n}.tar": size for n, size in enumerate(SIZES)})
    opened.clear()
    batches = stream(shards, start_step=50)
    assert batches.items == 30
    assert texts(batches, 3) == uncounted
    assert (read > 30, len(opened) <= 10) == (True, True)


def test_a_cut_shard_of_which_more_is_counted_changes_nothing_for_going_on(shards: Path, tmp_path: Path) -> None:
    for number in range(5):
        content = (shards / f"{number}.tar").read_bytes()
        (tmp_path / f"{number}.tar").write_bytes(content[:4000] if number == 2 else content)
    (tmp_path / "shards.json").write_text(json.dumps({f"{n}.tar": {"items": size} for n, size in enumerate(SIZES)}))
    whole = texts(stream(tmp_path), 24)
    assert len(set(flat(whole))) < 30
    for start in (7, 13, 20):  # past one, two and three epochs
        assert texts(stream(tmp_path, start_step=start), 4) == whole[start : start + 4]


def test_augmentation_and_captions_are_drawn_by_seed_epoch_and_sample(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for i in range(4):
        files |= {f"{i}.jpg": jpeg(i)} | {f"{i}.txt{n}.txt": f"{i} {n}".encode() for n in range(3)}
    tar = pack(tmp_path / "a.tar", files)
    settings: dict[str, Any] = {"batch_size": 4, "seed": 3, "shuffle": 0, "workers": 0}
    looks = list(islice(stream_batches(tar, train_transform(SMALL, "light"), **settings), 16))
    assert {text for look in looks for text in look["text"]} == {f"{i} {n}" for i in range(4) for n in range(3)}
    assert not torch.equal(looks[0]["image"], looks[1]["image"])
    torch.rand(10)
    again = list(islice(stream_batches(tar, train_transform(SMALL, "light"), **settings), 16))
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(looks, again, strict=True))
    assert [look["text"] for look in looks] == [look["text"] for look in again]
    (once,) = stream_once(tar, eval_transform(SMALL), batch_size=9, workers=0)
    assert once["text"] == [f"{i} 0" for i in range(4)]


def test_a_stream_sees_the_pixels_of_a_manifest(tmp_path: Path) -> None:
    m = read_folder(write_folder(tmp_path / "photos", classes=3, each=2))
    write_shards(m, tmp_path / "s" / "%d.tar", items=2, seed=None)
    images = torch.cat(
        [b["image"] for b in stream_once(tmp_path / "s", eval_transform(SMALL), batch_size=4, workers=0)]
    )
    assert len(images) == 6
    for row in range(6):
        assert torch.equal(images[row], eval_transform(SMALL)(m.image(row)))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_for_evaluation_every_sample_is_counted_whatever_the_workers(
    shards: Path, workers: int, batch_size: int
) -> None:
    batches = stream_once(f"{shards}/*.tar", eval_transform(SMALL), batch_size=batch_size, workers=workers)
    assert sorted(flat(batch["text"] for batch in batches)) == sorted(f"picture {i}" for i in range(30))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_broken_samples_are_skipped_and_counted_and_batches_stay_equal(tmp_path: Path) -> None:
    files = plain(6) | {
        "a.jpg": jpeg()[:99],
        "a.txt": b"cut",
        "b.jpg": jpeg(),
        "c.txt": b"alone",
        "d.jpg": jpeg(),
        "d.json": b"{",
    }
    tar = pack(tmp_path / "a.tar", files)
    settings: dict[str, Any] = {"batch_size": 5, "seed": 0, "workers": 0}
    batches = stream_batches(tar, eval_transform(SMALL), **settings)
    drawn = list(islice(batches, 6))
    assert {len(batch["image"]) for batch in drawn} == {len(batch["text"]) for batch in drawn} == {5}
    assert {text for batch in drawn for text in batch["text"]} == {f"picture {i}" for i in range(6)}
    reasons = {name.removeprefix(f"{tar}/"): reason for name, reason in batches.skipped}
    assert set(reasons) == {"a", "b", "c", "d"}
    assert (reasons["b"], reasons["c"]) == ("no caption", "no image, only txt")
    assert "cannot be decoded" in reasons["a"]
    later = stream_batches(tar, eval_transform(SMALL), start_step=3, **settings)
    assert texts(later, 3) == [batch["text"] for batch in drawn[3:]], "counting does not depend on what is broken"
    with pytest.raises(InputError, match=r"a\.tar/[abcd]: "):
        list(islice(stream_batches(tar, eval_transform(SMALL), on_error="raise", **settings), 3))


@pytest.mark.parametrize("recorded", [True, False])
def test_of_a_cut_shard_all_whole_samples_come(recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack(tmp_path / "a.tar", plain(9))
    rows = [room.Member.of(name) for name in read_shards(whole).ids()]
    content = whole.read_bytes()
    if recorded:
        (tmp_path / "shards.json").write_text(json.dumps({"a.tar": {"items": 9}}))
    assert rows[5] is not None
    for cut in (rows[5].offset - 512, rows[5].offset + 9, rows[5].offset + rows[5].size):
        whole.write_bytes(content[:cut])
        batches = stream_once(whole, eval_transform(SMALL), batch_size=4, workers=0)
        assert flat(batch["text"] for batch in batches) == [f"picture {i}" for i in range(5)]
        told = dict(batches.skipped).get(str(whole), "")
        if recorded or cut != rows[5].offset - 512:  # cut between two samples, a stream just ends
            assert told.startswith(f"cut or damaged: 5{' of 9' if recorded else ''} samples came (")


def test_what_gives_nothing_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "workers": 0}
    (tmp_path / "a.tar").write_bytes(b"words " * 300)
    with pytest.raises(InputError, match=r"no sample came out of any of 1 shards \(.*a.tar"):
        next(stream_batches(tmp_path / "a.tar", eval_transform(SMALL), **settings))
    silent = pack(tmp_path / "b.tar", {f"{i}.jpg": jpeg(i) for i in range(3)})
    with pytest.raises(InputError, match=r"no sample of 100 batches in a row can be used, .*: no caption"):
        next(stream_batches(silent, eval_transform(SMALL), **settings))
    with pytest.raises(InputError, match="no shard matches"):
        stream_batches(tmp_path / "c.tar", eval_transform(SMALL), **settings)
    with pytest.raises(InputError, match="a batch of 2 cannot be shared evenly by 3"):
        stream_batches(silent, eval_transform(SMALL), world_size=3, **settings)
    with pytest.raises(InputError, match="is a command"):
        stream_batches("pipe:curl x", eval_transform(SMALL), **settings)


def test_identity_is_a_label(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for i, product in enumerate([{"product": 7}, {"product": "x"}, {}, {"product": 7}]):
        files |= {f"{i}.jpg": jpeg(i), f"{i}.txt": b"x", f"{i}.json": json.dumps(product).encode()}
    tar = pack(tmp_path / "a.tar", files)
    batch = next(
        stream_batches(tar, eval_transform(SMALL), batch_size=4, seed=0, shuffle=0, workers=0, identity="product")
    )
    a, b, c, d = batch["label"].tolist()
    assert (a == d, a != b, c) == (True, True, -1)
    assert min(a, b) >= 0


# --------------------------------------------------------------------------------------------------------- addresses


class _Failing(SimpleHTTPRequestHandler):
    """A server that breaks off the first answers for one shard, and answers 503 to the first request for another."""

    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.asked[name] += 1
        content = Path(self.translate_path(self.path))
        if name == "1.tar" and self.asked[name] == 1:
            self.send_error(503)
        elif name == "2.tar" and self.asked[name] == 1:
            self.send_response(200)
            self.send_header("Content-Length", str(content.stat().st_size))
            self.end_headers()
            self.wfile.write(content.read_bytes()[:4000])
        else:
            super().do_GET()


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    _Failing.asked.clear()
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Failing, directory=str(shards)))
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()
    thread.join()


def test_a_web_server_gives_what_the_disk_gives(server: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through an answer that breaks off and one that comes at the second try."""
    monkeypatch.setattr(room.time, "sleep", lambda _: None)
    remote, local = stream(server, shuffle=6), stream(shards, shuffle=6)
    assert texts(remote, 15) == texts(local, 15)
    assert remote.skipped == []
    assert _Failing.asked["1.tar"] >= 2
    assert _Failing.asked["2.tar"] >= 2
    missing = stream_batches(
        [f"{server}/9.tar", f"{server}/0.tar"], eval_transform(SMALL), batch_size=7, seed=0, workers=0
    )
    assert sorted(flat(texts(missing, 2))) == sorted(2 * [f"picture {i}" for i in range(7)])
    ((name, reason),) = missing.skipped
    assert (name, "404" in reason) == (f"{server}/9.tar", True)


def test_parts_to_measure_on_are_fetched_once(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VICINAL_CACHE", str(tmp_path))
    first = read_shards(f"{server}/{{3..4}}.tar")
    assert len(first) == 11
    assert _Failing.asked["3.tar"] == 1
    again = read_shards(f"{server}/{{3..4}}.tar")
    assert again.table.equals(first.table)
    assert _Failing.asked["3.tar"] == 1
    with pytest.raises(InputError, match=r"2\.tar: 4,000 of [\d,]+ bytes came"):
        read_shards(f"{server}/2.tar")
    assert len(read_shards(f"{server}/2.tar")) == SIZES[2]


def test_packed_shards_can_be_streamed(shards: Path, tmp_path: Path) -> None:
    packed = tmp_path / "0.tar.gz"
    packed.write_bytes(gzip.compress((shards / "0.tar").read_bytes()))
    (batch,) = stream_once(packed, eval_transform(SMALL), batch_size=9, workers=0)
    assert batch["text"] == [f"picture {i}" for i in range(7)]
