"""An index of vectors: exact nearest neighbours by default, in one file that opens at once and belongs to one model.

    s_qg = x_q . y_g / (|x_q| |y_g|),       the k largest of each query, equal ones in the order of the index

Exact search goes through the vectors tile by tile. Of a tile only the best of each group of GROUP items is looked at
first: the k best items lie in the k groups with the largest maxima. More than k are kept, scored again in float64 and
sorted. What was dropped scored at most m, the least of what was kept, so it cannot be among the k best if

    s_k > m + e,    e = |x - x'| + max |y - y'| + u |m|    where x', y' are rounded, and the products to u of their size

and otherwise (copies of one picture) every item near s_k is scored. So the order is that of float64 products, and yet a
processor that multiplies bfloat16 may do that: four times as fast, from a copy of half the size, made after 64 queries.

The file is safetensors, read through the page cache: vectors, labels, and names as bytes with offsets, so that opening
reads some kilobytes, whatever its size. A change in memory never reaches a file but through `save`.

Letters: N items, D numbers an embedding, Q queries, q queries of one block, k neighbours, W items of one tile.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vicinal.data.manifest import Manifest
from vicinal.embedding import embed, embed_text
from vicinal.models.encoder import Encoder
from vicinal.types import Embeddings, InputError

__all__ = ["Index", "Names"]

BLOCK = 256  # queries at once
TILE = (4096, 65536)  # items at once, for many queries and for one
GROUP = 32  # items of which only the best is looked at first
MORE = 8  # candidates beside the k, which float32 might have ranked too low
MORE_BF16 = 64  # likewise, with 4 k, for bfloat16
ROUND_FROM = (64, 16384)  # queries asked so far, and items, from which on a rounded copy pays
CLOSE = 64 * 2.0**-24  # by which two cosines of float32 may fall in the wrong order
PRODUCTS = 2**22  # numbers scored again at once, in float64
SCHEMA = "vicinal index 1"


@dataclass(frozen=True, slots=True)
class Names(Sequence[str]):
    """N strings as one run of UTF-8 bytes: opened without being read, decoded one at a time.

    Args:
        letters: bytes, uint8.
        ends: "N", where each string ends.

    >>> names = Names.of(["a.png", "ü.png"])
    >>> names[1], len(names)
    ('ü.png', 2)
    """

    letters: Tensor
    ends: Int[Tensor, "N"]

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Pack strings."""
        parts = [name.encode() for name in names]
        letters = np.frombuffer(bytearray(b"".join(parts)) or bytearray(1), dtype=np.uint8)
        lengths = torch.tensor([len(part) for part in parts], dtype=torch.long)
        return cls(torch.from_numpy(letters), lengths.cumsum(0))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        """One string, or those of a slice."""
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        at = range(len(self))[row]
        start = int(self.ends[at - 1]) if at else 0
        return bytes(self.letters[start : int(self.ends[at])].numpy()).decode()

    def __iter__(self) -> Iterator[str]:
        """All of them; quicker than one by one."""
        letters, start = self.letters.numpy().tobytes(), 0
        for end in self.ends.tolist():
            yield letters[start:end].decode()
            start = end


class Index:
    """Vectors of one model, with ids and classes: add, remove, search, save, load.

    Vectors are scaled to length 1 on their way in, so scores are cosines. Whoever hands in vectors says which model
    they are of, by its fingerprint (weights, adapters and preprocessing); another's are refused.

    Args:
        fingerprint: of the model, `Encoder.fingerprint()`.
        faiss: None searches exactly. Else a recipe of faiss's index_factory, "HNSW32" or "IVF1024,PQ32" say: faster on
            millions of items, and approximate. It needs faiss-cpu, is built at the first search after a change, and is
            saved within the file.
        about: whatever else goes into the file and back, such as where the model is found.

    >>> index = Index("abc")
    >>> vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    >>> index.add(Embeddings(vectors, torch.tensor([0, 1]), ("a.png", "b.png"), ("cat", "dog")), fingerprint="abc")
    >>> scores, ids = index.search(torch.tensor([[0.0, 2.0]]), 1, fingerprint="abc")
    >>> ids, index.class_of("b.png")
    ([('b.png',)], 'dog')
    """

    def __init__(
        self, fingerprint: str, *, faiss: str | None = None, about: Mapping[str, str | int | None] | None = None
    ) -> None:
        self.fingerprint = fingerprint
        self.faiss = faiss
        self.about = dict(about or {})
        self._vectors = [torch.zeros(0, 0)]  # joined at the next use, so that many additions cost what one does
        self._labels = [torch.zeros(0, dtype=torch.long)]
        self._ids: Names | list[str] = []
        self._classes: Names | list[str] = []
        self._row: dict[str, int] | None = None
        self._engine: Any = None
        self._rounded: _Rounded | None = None
        self._asked = 0

    # ---- what is in it

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dim(self) -> int:
        """D; 0 while it is empty and nothing was ever added."""
        return int(self._vectors[0].shape[1] or self._vectors[-1].shape[1])

    @property
    def vectors(self) -> Float[Tensor, "N D"]:
        """Unit rows; those of a loaded index are read from the file where they are used."""
        if len(self._vectors) > 1:
            self._vectors = [torch.cat([part for part in self._vectors if len(part)] or self._vectors[-1:])]
        return self._vectors[0]

    @property
    def labels(self) -> Int[Tensor, "N"]:
        """Positions in `classes`, -1 for an item without a class."""
        if len(self._labels) > 1:
            self._labels = [torch.cat(self._labels)]
        return self._labels[0]

    @property
    def ids(self) -> Sequence[str]:
        """Names of the items, unique."""
        return self._ids

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order in which they came; one may be left without items."""
        return self._classes

    def row_of(self, name: str) -> int:
        """Where an item stands.

        Raises:
            InputError: it is not in the index.
        """
        rows = self._rows()
        if name not in rows:
            near = difflib.get_close_matches(name, self.ids, 1, 0.0) if len(self) <= 10_000 else self.ids[:1]
            raise InputError(
                f"{name} is not in the index of {len(self):,} items"
                + (f"; its names are like {near[0]}" if near else "")
            )
        return rows[name]

    def class_of(self, name: str) -> str | None:
        """The class of an item, None where it has none.

        Raises:
            InputError: it is not in the index.
        """
        label = int(self.labels[self.row_of(name)])
        return None if label < 0 else self._classes[label]

    def embeddings(self) -> Embeddings:
        """All of it, as the matcher takes references.

        Raises:
            InputError: an item has no class.
        """
        if (self.labels < 0).any():
            first = self._ids[int((self.labels < 0).nonzero()[0])]
            raise InputError(f"{first} has no class, and a reference needs one: add it from a labelled manifest")
        return Embeddings(self.vectors, self.labels, tuple(self._ids), tuple(self._classes))

    # ---- changing it

    def add(self, embeddings: Embeddings, *, fingerprint: str) -> None:
        """Append items. Classes are joined by name.

        Args:
            embeddings: with ids that are not in the index yet; without classes they are items of none.
            fingerprint: of the model that made them.

        Raises:
            InputError: another model, another width, an id that is there already, a vector that is zero or not finite.
        """
        vectors = self._unit(embeddings.vectors, fingerprint, "embeddings")
        rows = self._rows()
        twice = next((name for name in embeddings.ids if name in rows), None)
        if twice is None and len(set(embeddings.ids)) < len(embeddings.ids):
            seen: set[str] = set()
            twice = next(name for name in embeddings.ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        if twice is not None:
            raise InputError(f"{twice} is in the index already; remove it first, or give the new one another id")
        self._classes, self._ids = list(self._classes), self._ids if isinstance(self._ids, list) else list(self._ids)
        place = {name: i for i, name in enumerate(self._classes)}
        where = [place.setdefault(name, len(place)) for name in embeddings.classes]
        self._classes = list(place)
        labels = torch.full((len(embeddings),), -1)
        if where:
            labels = torch.tensor(where)[embeddings.labels.cpu()]
        rows.update({name: len(self._ids) + i for i, name in enumerate(embeddings.ids)})
        self._ids.extend(embeddings.ids)
        self._vectors.append(vectors)
        self._labels.append(labels)
        self._engine = self._rounded = None

    def remove(self, ids: Iterable[str]) -> None:
        """Take items out; the others keep their order.

        Raises:
            InputError: an id is not in the index; nothing is removed then.
        """
        gone = torch.tensor([self.row_of(name) for name in ids], dtype=torch.long)
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[gone] = False
        names = list(self._ids)
        self._ids = [names[i] for i in kept.nonzero().flatten().tolist()]
        self._vectors, self._labels = [self.vectors[kept]], [self.labels[kept]]
        self._row = self._engine = self._rounded = None

    # ---- asking it

    def search(
        self, queries: Float[Tensor, "Q D"], k: int, *, fingerprint: str
    ) -> tuple[Float[Tensor, "Q k"], list[tuple[str, ...]]]:
        """The k nearest items of each query: cosines, and ids; see `neighbours`.

        Args:
            queries: any number; they are taken in blocks, so memory does not grow with Q times N.
            k: how many; all where there are fewer.
            fingerprint: of the model that made the queries.

        Raises:
            InputError: another model, another width, a query that is zero or not finite, an empty index.
            ValueError: k < 1.
        """
        scores, rows = self.neighbours(queries, k, fingerprint=fingerprint)
        return scores, [tuple(self._ids[row] for row in found if row >= 0) for found in rows.tolist()]

    def search_images(
        self,
        encoder: Encoder,
        manifest: Manifest,
        k: int,
        *,
        cache: str | Path | None = None,
        device: str | torch.device = "auto",
    ) -> tuple[Float[Tensor, "Q k"], list[tuple[str, ...]]]:
        """The k nearest items of each image of a manifest.

        The model's weights are hashed at each call; who asks often keeps `encoder.fingerprint()` and calls `search`.

        Args:
            encoder: the index's model.
            manifest: what is asked about.
            k: as in `search`.
            cache: a folder of kept vectors, as in `vicinal.embedding.embed`.
            device: "auto", "cpu", "cuda:0", …

        Raises:
            InputError: as in `search`; an image cannot be read.
        """
        fingerprint = self._own(encoder)
        found = embed(encoder, manifest, cache=cache, device=device)
        return self.search(found.vectors, k, fingerprint=fingerprint)

    def search_text(
        self, encoder: Encoder, texts: Sequence[str], k: int, *, device: str | torch.device = "auto"
    ) -> tuple[Float[Tensor, "Q k"], list[tuple[str, ...]]]:
        """The k nearest items of each text.

        Args:
            encoder: the index's model, with a text tower.
            texts: what is asked for.
            k: as in `search`.
            device: "auto", "cpu", "cuda:0", …

        Raises:
            InputError: as in `search`; the encoder has no text tower.
        """
        fingerprint = self._own(encoder)
        return self.search(embed_text(encoder, texts, device=device), k, fingerprint=fingerprint)

    def neighbours(
        self, queries: Float[Tensor, "Q D"], k: int, *, fingerprint: str
    ) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
        """The k nearest items of each query: cosines, best first, and rows of `ids` and `labels`.

        Equal cosines stand in the order of the index. With faiss the result is approximate, and a place that it left
        empty has the score -inf and the row -1.

        Args:
            queries: as in `search`.
            k: as in `search`.
            fingerprint: as in `search`.

        Raises:
            InputError: as in `search`.
            ValueError: as in `search`.
        """
        if k < 1:
            raise ValueError(f"search needs k >= 1, not {k}")
        if len(self) == 0:
            raise InputError("the index is empty: add embeddings to it, with `vicinal index`")
        queries, k = self._unit(queries, fingerprint, "queries"), min(k, len(self))
        if self.faiss is not None:
            return self._by_faiss(queries, k)
        scores, rows = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
        self._asked += len(queries)
        often = self._asked >= ROUND_FROM[0] and len(self) >= ROUND_FROM[1]
        if self._rounded is None and often and _multiplies_bf16():
            self._rounded = _Rounded.of(self.vectors)
        step = max(1, min(BLOCK, PRODUCTS // ((k + MORE) * self.dim)))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            scores[part], rows[part] = _exact(queries[part], self.vectors, k, self._rounded)
        return scores, rows

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write one file. It appears whole or not at all; one that is loaded from it stays as it is.

        Args:
            path: the file, by custom with the ending .index.
        """
        from safetensors.torch import save_file

        path = Path(path)
        ids, classes = (n if isinstance(n, Names) else Names.of(n) for n in (self._ids, self._classes))
        tensors = {
            "vectors": self.vectors.contiguous(),
            "labels": self.labels.contiguous(),
            "ids.letters": ids.letters,
            "ids.ends": ids.ends,
            "classes.letters": classes.letters,
            "classes.ends": classes.ends,
        }
        if self.faiss is not None and len(self):
            import faiss

            tensors["faiss"] = torch.from_numpy(faiss.serialize_index(self._faiss()))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        notes = {"schema": SCHEMA, "fingerprint": self.fingerprint, "faiss": self.faiss, "about": self.about}
        try:
            save_file(tensors, part, {"index": json.dumps(notes)})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Open what `save` wrote. Nothing large is read before it is used.

        Raises:
            InputError: the file is missing, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:  # maps the file, privately: writes stay in memory
                notes = json.loads((file.metadata() or {})["index"])
                if notes["schema"] != SCHEMA:
                    raise InputError(f"{path} is of another version ({notes['schema']}): make it anew")
                index = cls(notes["fingerprint"], faiss=notes["faiss"], about=notes.get("about"))
                index._vectors, index._labels = [file.get_tensor("vectors")], [file.get_tensor("labels")]
                index._ids = Names(file.get_tensor("ids.letters"), file.get_tensor("ids.ends"))
                index._classes = Names(file.get_tensor("classes.letters"), file.get_tensor("classes.ends"))
                if "faiss" in file.keys():  # noqa: SIM118, no mapping
                    index._engine = file.get_tensor("faiss")
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not an index ({error}); make one with `vicinal index`") from error
        return index

    # ---- inside

    def _rows(self) -> dict[str, int]:
        if self._row is None:
            self._row = {name: i for i, name in enumerate(self._ids)}
        return self._row

    def _own(self, encoder: Encoder) -> str:
        fingerprint = encoder.fingerprint()
        self._refuse(fingerprint)
        return fingerprint

    def _refuse(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise InputError(
                f"the index holds vectors of the model {self.fingerprint[:12]}…, and these are of {fingerprint[:12]}…, "
                "so a product of the two says nothing: embed with the index's model (weights, adapters and "
                "preprocessing), or index anew with this one"
            )

    def _unit(self, vectors: Float[Tensor, "Q D"], fingerprint: str, name: str) -> Float[Tensor, "Q D"]:
        self._refuse(fingerprint)
        if self.dim and vectors.shape[1] != self.dim:
            raise InputError(f"{name}: {vectors.shape[1]} numbers a vector, and the index has {self.dim}")
        vectors = vectors.detach().cpu().float()
        length = vectors.norm(dim=1, keepdim=True)
        wrong = ~(torch.isfinite(length) & (length > 0)).flatten()
        if wrong.any():
            raise InputError(f"{name}: row {int(wrong.nonzero()[0])} is zero or not finite; embed it anew")
        unit: Tensor = vectors / length
        return unit

    def _faiss(self) -> Any:  # noqa: ANN401, faiss has no types
        assert self.faiss is not None
        try:
            import faiss
        except ImportError as error:
            raise InputError(f"faiss={self.faiss} needs faiss: pip install faiss-cpu, or leave it away") from error
        if isinstance(self._engine, Tensor):
            self._engine = faiss.deserialize_index(self._engine.numpy())
        elif self._engine is None:
            vectors = self.vectors.numpy()
            try:
                engine = faiss.index_factory(self.dim, self.faiss, faiss.METRIC_INNER_PRODUCT)
                engine.train(vectors)
                engine.add(vectors)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise InputError(f"faiss={self.faiss!r} cannot index {len(self):,} items: {reason}") from error
            self._engine = engine
        return self._engine

    def _by_faiss(self, queries: Float[Tensor, "Q D"], k: int) -> tuple[Tensor, Tensor]:
        scores, rows = self._faiss().search(queries.numpy(), k)
        found = torch.from_numpy(rows)
        return torch.from_numpy(scores).masked_fill(found < 0, -torch.inf), found


@dataclass(frozen=True, slots=True)
class _Rounded:
    """Unit rows in bfloat16, and the most that one of them is off: max |y - y'|."""

    vectors: Tensor
    error: float

    @classmethod
    def of(cls, vectors: Float[Tensor, "N D"]) -> _Rounded:
        rounded, error = torch.empty_like(vectors, dtype=torch.bfloat16), 0.0
        for start in range(0, len(vectors), TILE[0]):
            part = slice(start, start + TILE[0])
            rounded[part] = vectors[part]
            error = max(error, float((vectors[part] - rounded[part].float()).norm(dim=1).max()))
        return cls(rounded, error)


def _exact(
    queries: Float[Tensor, "q D"], vectors: Float[Tensor, "N D"], k: int, rounded: _Rounded | None
) -> tuple[Tensor, Tensor]:
    """The k best items of one block of queries, as float64 ranks them; equal ones in the order of the items."""
    wanted = min(k + MORE if rounded is None else 4 * k + MORE_BF16, len(vectors))
    width = min(max(2**20 // len(queries) // 4096 * 4096, TILE[0]), TILE[1])
    asked, items = (queries, vectors) if rounded is None else (queries.bfloat16(), rounded.vectors)
    best = torch.empty(len(queries), 0, dtype=asked.dtype)
    found = torch.empty(len(queries), 0, dtype=torch.long)
    cut = torch.full((len(queries),), -torch.inf, dtype=asked.dtype)
    for start in range(0, len(vectors), width):
        scores, rows = _of_tile(_products(asked, items[start : start + width]), wanted, cut)
        best, found = torch.cat([best, scores], 1), torch.cat([found, rows + start], 1)
        if best.shape[1] > wanted:
            kept = best.topk(wanted, sorted=False)
            best, found = kept.values, found.gather(1, kept.indices)
        if best.shape[1] == wanted:
            cut = best.amin(1)
    slack = torch.full((len(queries),), CLOSE)
    if rounded is not None:
        best, order = best.sort(dim=1, descending=True)
        kth = best[:, k - 1].float()
        off = (queries - asked.float()).norm(dim=1) + 1.01 * rounded.error
        slack += 1.01 * off + 2.0**-7 * torch.maximum(kth.abs(), cut.float().abs().nan_to_num(posinf=0.0))
        slack += queries.shape[1] * 2.0**-22
        near = int((best.float() >= (kth - 2 * slack)[:, None]).sum(1).max())  # none of the others is among the k best
        found = found.gather(1, order[:, :near])
    found = found.sort(dim=1).values
    exact = torch.einsum("qd,qwd->qw", queries.double(), vectors[found].double())
    order = exact.argsort(dim=1, descending=True, stable=True)[:, :k]
    exact, found = exact.gather(1, order), found.gather(1, order)
    if wanted < len(vectors):
        for row in (exact[:, -1] - cut.double() <= slack).nonzero().flatten().tolist():
            exact[row], found[row] = _all_near(queries[row], vectors, float(exact[row, -1]) - CLOSE, k)
    return exact.float(), found


def _products(queries: Tensor, items: Tensor) -> Tensor:
    if queries.dtype == torch.bfloat16:
        return queries @ items.T
    return torch.from_numpy(queries.numpy() @ items.numpy().T)  # its BLAS reads twice as fast as torch's for one query


def _all_near(query: Float[Tensor, "D"], vectors: Float[Tensor, "N D"], floor: float, k: int) -> tuple[Tensor, Tensor]:
    """The k best of all items that reach `floor`, however many these are."""
    near = torch.cat([
        start + (vectors[start : start + TILE[1]] @ query >= floor).nonzero().flatten()
        for start in range(0, len(vectors), TILE[1])
    ])  # fmt: skip
    step = max(1, PRODUCTS // len(query))
    exact = torch.cat([(vectors[part].double() * query.double()).sum(1) for part in torch.split(near, step)])
    order = exact.argsort(descending=True, stable=True)[:k]
    return exact[order], near[order]


def _of_tile(similarity: Tensor, wanted: int, cut: Tensor) -> tuple[Tensor, Tensor]:
    """The `wanted` largest of each row, in no order; fewer where no row has as many groups above its `cut`."""
    size, width = similarity.shape
    groups = width // GROUP
    if groups * GROUP == width:
        # Group g is the columns g, g + groups, g + 2 groups, …: maxima over a stride are what a processor does at once.
        maxima = similarity.view(size, GROUP, groups).amax(1)
        several = min(int((maxima > cut[:, None]).sum(1).max()), wanted)
        if several * 2 <= groups:
            group = maxima.topk(several, sorted=False).indices
            columns = (group[:, :, None] + torch.arange(0, width, groups)).flatten(1)
            top = similarity.gather(1, columns).topk(min(wanted, several * GROUP), sorted=False)
            return top.values, columns.gather(1, top.indices)
    top = similarity.topk(min(wanted, width), sorted=False)
    return top.values, top.indices


@lru_cache(maxsize=1)
def _multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 products of its own; emulated ones are slower than float32."""
    # Only newer versions of torch can tell; older ones then take the float32 products, which are as exact.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"))
