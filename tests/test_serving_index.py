"""The index against a float64 loop and faiss; files; what belongs to another model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import tiny_encoders
from pictures import write_folder
from vicinal.data.sources import read_folder
from vicinal.embedding import embed, embed_text
from vicinal.serving import index as module
from vicinal.serving.index import Index, Names
from vicinal.types import Embeddings, InputError

MODEL = "m" * 64


def made(size: int = 40, dim: int = 8, *, seed: int = 0, prefix: str = "i") -> Embeddings:
    vectors = normalize(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)), dim=1)
    return Embeddings(vectors, torch.arange(size) % 3, tuple(f"{prefix}{i}" for i in range(size)), ("a", "b", "ü"))


def filled(embeddings: Embeddings, **settings: str) -> Index:
    index = Index(MODEL, **settings)
    index.add(embeddings, fingerprint=MODEL)
    return index


def by_hand(queries: Tensor, vectors: Tensor, k: int) -> list[list[int]]:
    x, y = (normalize(v.double(), dim=1) for v in (queries, vectors))
    return [sorted(range(len(y)), key=lambda g, q=q: (-float(q @ y[g]), g))[:k] for q in x]


# ---- search


@pytest.mark.parametrize("k", [1, 7, 40, 99])
def test_search_is_the_float64_loop(k: int):
    gallery, queries = made(), made(11, seed=1).vectors * 3
    scores, rows = filled(gallery).neighbours(queries, k, fingerprint=MODEL)
    assert rows.tolist() == by_hand(queries, gallery.vectors, k)
    cosines = normalize(queries, dim=1) @ gallery.vectors.T
    torch.testing.assert_close(scores, cosines.gather(1, rows))
    assert filled(gallery).search(queries, k, fingerprint=MODEL)[1][0][0] == gallery.ids[int(rows[0, 0])]


@pytest.mark.parametrize("size", [9, 4096, 4097, 9000], ids=str)
@pytest.mark.parametrize("asked", [1, 300], ids=["one", "many"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_tiles_blocks_and_rounding_change_nothing(size: int, asked: int, bf16: bool, monkeypatch: pytest.MonkeyPatch):
    gallery, queries = made(size, 16), made(asked, 16, seed=2).vectors
    monkeypatch.setattr(module, "TILE", (4096, 4096))
    monkeypatch.setattr(module, "ROUND_FROM", (0, 0))
    monkeypatch.setattr(module, "_multiplies_bf16", lambda: bf16)
    rows = filled(gallery).neighbours(queries, 5, fingerprint=MODEL)[1]
    exact = queries.double() @ gallery.vectors.double().T
    assert torch.equal(rows, exact.argsort(dim=1, descending=True, stable=True)[:, :5])


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_copies_stand_in_the_order_of_the_index(bf16: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROUND_FROM", (0, 0))
    monkeypatch.setattr(module, "_multiplies_bf16", lambda: bf16)
    vectors = torch.eye(4)[torch.arange(5000) % 4]
    gallery = Embeddings(vectors, torch.zeros(5000, dtype=torch.long), tuple(map(str, range(5000))), ("a",))
    rows = filled(gallery).neighbours(torch.eye(4), 6, fingerprint=MODEL)[1]
    assert rows.tolist() == [[q + 4 * i for i in range(6)] for q in range(4)]


def test_faiss_inside(tmp_path: Path):
    gallery, queries = made(500, 16), made(20, 16, seed=3).vectors
    exact = filled(gallery).neighbours(queries, 5, fingerprint=MODEL)
    flat = filled(gallery, faiss="Flat")
    scores, rows = flat.neighbours(queries, 5, fingerprint=MODEL)
    assert torch.equal(rows, exact[1])
    torch.testing.assert_close(scores, exact[0])
    near = filled(gallery, faiss="HNSW16")
    found = near.neighbours(queries, 5, fingerprint=MODEL)[1]
    assert (found[:, :, None] == exact[1][:, None]).any(2).float().mean() > 0.9
    back = Index.load(near.save(tmp_path / "x.index"))
    assert torch.equal(back.neighbours(queries, 5, fingerprint=MODEL)[1], found)  # not built again
    back.remove(["i0"])
    assert (back.neighbours(gallery.vectors[:1], 1, fingerprint=MODEL)[1] != 0).all() or back.ids[0] == "i1"
    assert back.search(gallery.vectors[:1], 1, fingerprint=MODEL)[1] != [("i0",)]
    empty = filled(gallery, faiss="IVF8,Flat").neighbours(queries, 500, fingerprint=MODEL)
    assert (empty[1] == -1).any()
    assert (empty[0][empty[1] == -1] == -torch.inf).all()
    for recipe in ("Nonsense", "IVF1000,Flat"):
        with pytest.raises(InputError, match=f"faiss='{recipe}' cannot index 500 items"):
            filled(gallery, faiss=recipe).search(queries, 1, fingerprint=MODEL)


def test_pictures_and_texts_ask_through_the_model_and_no_other(tmp_path: Path):
    encoder = tiny_encoders.transformers(tmp_path / "model")
    manifest = read_folder(write_folder(tmp_path / "data", classes=2, each=2))
    found = embed(encoder, manifest, device="cpu")
    index = Index(encoder.fingerprint())
    index.add(found, fingerprint=encoder.fingerprint())
    scores, ids = index.search_images(encoder, manifest, 1, device="cpu")
    assert ids == [(name,) for name in manifest.ids()]
    torch.testing.assert_close(scores, torch.ones(4, 1))
    scores, ids = index.search_text(encoder, ["a", "bb"], 4, device="cpu")
    rows = (embed_text(encoder, ["a", "bb"], device="cpu") @ found.vectors.T).argsort(dim=1, descending=True)
    assert ids == [tuple(found.ids[i] for i in row) for row in rows.tolist()]
    with torch.no_grad():
        next(encoder.parameters()).flatten()[0] += 1
    for ask in (lambda: index.search_images(encoder, manifest, 1), lambda: index.search_text(encoder, ["a"], 1)):
        with pytest.raises(InputError, match="holds vectors of the model"):
            ask()


# ---- change


def test_added_and_removed_as_if_they_had_always_or_never_been_there():
    one, two = made(20), made(15, seed=4, prefix="j")
    two = Embeddings(two.vectors, two.labels, two.ids, ("ü", "z", "a"))
    index = filled(one)
    index.add(two, fingerprint=MODEL)
    assert list(index.classes) == ["a", "b", "ü", "z"]
    for part in (one, two):
        for i, name in enumerate(part.ids):
            assert index.class_of(name) == part.classes[int(part.labels[i])]
            assert torch.equal(index.vectors[index.row_of(name)], normalize(part.vectors, dim=1)[i])
    gone = ["j3", "i0", "i19"]
    index.remove(gone)
    kept = [name for name in one.ids + two.ids if name not in gone]
    assert list(index.ids) == kept
    queries = made(5, seed=5).vectors
    rows = by_hand(queries, torch.cat([one.vectors, two.vectors])[[n not in gone for n in one.ids + two.ids]], 4)
    assert index.search(queries, 4, fingerprint=MODEL)[1] == [tuple(kept[g] for g in row) for row in rows]
    index.add(one.where(torch.arange(20) == 0), fingerprint=MODEL)  # it may come back
    assert index.class_of("i0") == "a"
    bare = Embeddings(two.vectors[:1], torch.zeros(1, dtype=torch.long), ("bare",), ())
    index.add(bare, fingerprint=MODEL)
    assert index.class_of("bare") is None
    with pytest.raises(InputError, match="bare has no class"):
        index.embeddings()


def test_bad_input_is_named():
    index = filled(made())
    x = made(2).vectors
    bad = x.clone()
    bad[1] = float("nan")
    for wrong, says in (
        (bad, "row 1 is zero or not finite"),
        (x * 0, "row 0 is zero"),
        (x[:, :4], "4 numbers a vector"),
    ):
        with pytest.raises(InputError, match=says):
            index.search(wrong, 1, fingerprint=MODEL)
    with pytest.raises(InputError, match="i3 is in the index already"):
        index.add(made().where(torch.arange(40) == 3), fingerprint=MODEL)
    twice = Embeddings(x, torch.tensor([0, 0]), ("n", "n"), ("a",))
    with pytest.raises(InputError, match="n is in the index already"):
        index.add(twice, fingerprint=MODEL)
    with pytest.raises(InputError, match="nobody is not in the index of 40 items"):
        index.remove(["i1", "nobody"])
    assert len(index) == 40
    with pytest.raises(ValueError, match="k >= 1"):
        index.search(x, 0, fingerprint=MODEL)
    with pytest.raises(InputError, match="empty"):
        Index(MODEL).search(x, 1, fingerprint=MODEL)
    for use in (lambda: index.search(x, 1, fingerprint="o" * 64), lambda: index.add(made(), fingerprint="o" * 64)):
        with pytest.raises(InputError, match="model mmmmmmmmmmmm…, and these are of oooooooooooo…"):
            use()


# ---- files


def test_a_file_comes_back_and_changes_only_by_save(tmp_path: Path):
    path = filled(made()).save(tmp_path / "deep" / "x.index")
    assert [p.name for p in path.parent.iterdir()] == ["x.index"]
    index, before = Index.load(path), path.read_bytes()
    assert (list(index.ids), list(index.classes), index.fingerprint) == (list(made().ids), ["a", "b", "ü"], MODEL)
    assert index.class_of("i2") == "ü"
    index.vectors[0] = 7.0  # in memory alone
    assert path.read_bytes() == before
    index = Index.load(path)
    index.remove(["i0"])
    index.save(path)  # over the file that it is read from
    again = Index.load(path)
    assert len(again) == 39
    assert again.search(made().vectors[5:6], 1, fingerprint=MODEL)[1] == [("i5",)]
    empty = Index.load(Index(MODEL).save(tmp_path / "empty.index"))
    empty.add(made(), fingerprint=MODEL)
    assert len(empty) == 40


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = filled(made()).save(tmp_path / "x.index")
    before = path.read_bytes()

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        filled(made(9)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.index"]


def test_opening_reads_neither_vectors_nor_names(tmp_path: Path):
    size = 60_000
    vectors = torch.ones(size, 128)
    big = Embeddings(vectors, torch.zeros(size, dtype=torch.long), tuple(f"picture-{i}" for i in range(size)), ("a",))
    path = filled(big).save(tmp_path / "x.index")
    index = Index.load(path)
    assert (len(index), index.ids[size - 1], index.vectors[7, 0]) == (size, f"picture-{size - 1}", 128**-0.5)
    pages = Path("/proc/self/smaps")
    if pages.exists():  # what of the map is in this process's memory, in kB
        maps = pages.read_text().split(str(path))[1:]
        held = [next(int(line.split()[1]) for line in m.splitlines() if line.startswith("Rss:")) for m in maps]
        assert 0 < sum(held) < path.stat().st_size / 1024 / 10


@pytest.mark.parametrize("content", [b"", b"no tensors here", None], ids=["empty", "text", "missing"])
def test_what_is_no_index_is_said_to_be_none(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "x.index").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.index is not an index"):
        Index.load(tmp_path / "x.index")


def test_embeddings_are_no_index(tmp_path: Path):
    made().save(tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="is not an index"):
        Index.load(tmp_path / "e.safetensors")


def test_names_are_what_they_were():
    words = ["", "a", "\u00fc/\u6f22.png", "", "z" * 300]
    names = Names.of(words)
    assert list(names) == words == [names[i] for i in range(5)] == names[:]
    assert (names[-1], names[1:3], "a" in names, len(Names.of([]))) == (words[-1], words[1:3], True, 0)
    with pytest.raises(IndexError):
        names[5]
    np.testing.assert_array_equal(names.ends, np.cumsum([len(w.encode()) for w in words]))
