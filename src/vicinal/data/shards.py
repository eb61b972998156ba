"""Shards: images and what is said of them in tars, as WebDataset lays them out; read to a Manifest, and written.

Files of one key make an item. The key is a file's path up to the first dot of its name, the kind is what follows:

    0001.jpg                                 the image: jpg, jpeg, png, webp, or another that can be read
    0001.txt   0001.txt1.txt   0001.2.txt    captions, the first of them in `text`, all of them in `captions`
    0001.json  0001.meta.json                named values, which become columns; a word or a list of words is captions
    0001.cls                                 the label

Local tars are walked through once. What was found stands in an index beside each tar (in the cache, where the folder
cannot be written to), which holds as long as the tar's size and time do. The images stay where they are: a row's path
points into the tar (see `images.Member`), so that everything that a manifest can do it can do with shards: exact
splits, any sampler, exact resume.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import io
import json
import logging
import os
import posixpath
import re
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vicinal.data.images import Member, read_bytes
from vicinal.data.loader import default_workers
from vicinal.data.manifest import FEW, IMAGE_ENDINGS, Manifest, split_word
from vicinal.data.tables import map_columns
from vicinal.types import InputError

__all__ = [
    "Said",
    "expand",
    "image_kind",
    "kinds_of",
    "opened",
    "read_shards",
    "recorded",
    "said",
    "split_key",
    "write_shards",
]

Source = str | Path
Patterns = Source | Sequence[Source]

log = logging.getLogger(__name__)

INDEX = "1"  # written into each index; one of another number is made anew
COUNTS = "shards.json"  # beside the shards that `write_shards` wrote
IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELDS = (
    "label",
    "class",
    "class_name",
    "classname",
    "label_name",
    "target",
)  # a category is no label: see below
CAPTION_FIELDS = ("captions", "caption", "text", "texts")
TRIES = 3  # to open an address


# ------------------------------------------------------------------------------------------------------------ patterns


def expand(patterns: Patterns) -> list[str]:
    """The shards that patterns name, in order, without repeats: paths of files that are there, or addresses.

    Args:
        patterns: one or several of a path or address, with brace ranges (`{000000..000260}` keeps its zeros), brace
            lists (`{train,val}`) and, for paths, `*`, `?`, `[…]`; a folder stands for all `.tar` in it; `::` joins.

    Raises:
        InputError: a pattern matches nothing, files of a range are missing, or it is a command (`pipe:`).

    >>> expand("https://host/clip_{008..010}.tar::https://host/more.tar")
    ['https://host/clip_008.tar', 'https://host/clip_009.tar', 'https://host/clip_010.tar', 'https://host/more.tar']
    """
    given = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    found = [shard for pattern in given for part in str(pattern).split("::") for shard in _expanded(part.strip())]
    if not found:
        raise InputError("no shards are named; give a pattern such as train_{000000..000260}.tar")
    return list(dict.fromkeys(found))


def _expanded(pattern: str) -> list[str]:
    if pattern.startswith(("pipe:", "|")):
        raise InputError(f"{pattern!r} is a command to run, which a data set may not name; fetch the shards first")
    scheme = urlsplit(pattern).scheme
    if len(scheme) > 1:  # one letter is a drive of Windows
        if scheme not in ("http", "https"):
            raise InputError(
                f"{pattern!r}: shards are files, or lie behind http or https; mount or fetch those of {scheme}"
            )
        return _braces(pattern)
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(str(tar) for tar in path.glob("*.tar"))
        return found or _refuse_nothing(pattern, path)
    found = []
    absent = []
    for name in _braces(str(path)):
        if Path(name).is_file():
            found.append(name)
        elif matched := sorted(glob.glob(name)) if glob.has_magic(name) else []:  # noqa: PTH207  (absolute, too)
            found += matched
        else:
            absent.append(name)
    if not found:
        return _refuse_nothing(pattern, path)
    if absent:
        raise InputError(
            f"{pattern}: {len(absent):,} of {len(absent) + len(found):,} shards are missing, the first {absent[0]}; "
            "mend the range, or bring them"
        )
    return found


def _braces(text: str) -> list[str]:
    """As a shell expands {a,b} and {01..12}."""
    brace = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if brace is None:
        return [text]
    first, last, words = brace.groups()
    if words is not None:
        parts = words.split(",")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(first) <= int(last) else -1
        parts = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    return [one for part in parts for one in _braces(text[: brace.start()] + part + text[brace.end() :])]


def _refuse_nothing(pattern: str, path: Path) -> list[str]:
    """Name the pattern, and what lies nearest to it."""
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    tars = sorted(tar.name for tar in folder.glob("*.tar"))
    packed = sorted(f.name for kind in ("*.tar.gz", "*.tgz", "*.tar.zst") for f in folder.glob(kind))
    if tars:
        near = difflib.get_close_matches(path.name, tars, FEW, cutoff=0.3) or tars[:FEW]
        hint = f"{folder} holds {len(tars):,} tars, such as {', '.join(near)}"
    elif packed:
        hint = f"{folder} holds {packed[0]}: shards are read at random, so unpack them to .tar (gunzip) first"
    else:
        below = sorted({tar.parent for tar in folder.glob("*/*.tar")})
        hint = f"there are tars in {', '.join(map(str, below[:FEW]))}" if below else f"{folder} holds no .tar"
    raise InputError(f"no shard matches {pattern!r}; {hint}")


# ------------------------------------------------------------------------------------------------- what an item holds


class Said(NamedTuple):
    """What stands beside an image.

    Args:
        texts: its captions, the main one first.
        label: of `.cls`.
        fields: of `.json`.
    """

    texts: list[str]
    label: str | None
    fields: dict[str, Any]


def split_key(name: str) -> tuple[str, str]:
    """Key and kind of a file in a shard; the kind is in lower case, and empty where the name has no dot.

    >>> split_key("a.b/0001.TXT0.txt")
    ('a.b/0001', 'txt0.txt')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return folder + slash + stem, kind.lower()


def image_kind(kinds: Sequence[str]) -> str | None:
    """Which of an item's kinds is its image: `jpg` before `image.jpg`, `jpg` before `png`."""
    plain = [kind for kind in IMAGE_KINDS if kind in kinds]
    dotted = sorted(kind for kind in kinds if f".{kind}".endswith(IMAGE_ENDINGS))
    return next(iter(plain + dotted), None)


def is_said(kind: str) -> bool:
    """Whether a file of this kind is read with the index: words, values or a label."""
    return kind == "cls" or kind.rpartition(".")[2] in ("txt", "json")


def said(files: Mapping[str, bytes]) -> Said:
    """What the files of an item say, by kind.

    Raises:
        ValueError: one is not UTF-8, or not JSON.

    >>> said({"txt": b"a red boot", "txt1.txt": b"boot", "json": b'{"brand": "Acme"}', "jpg": b"..."})
    Said(texts=['a red boot', 'boot'], label=None, fields={'brand': 'Acme'})
    """
    written = sorted((kind for kind in files if kind.rpartition(".")[2] == "txt"), key=_natural)
    texts = [files[kind].decode("utf-8-sig").strip("\r\n") for kind in written]
    fields: dict[str, Any] = {}
    more: list[Any] = []
    for kind in sorted((kind for kind in files if kind.rpartition(".")[2] == "json"), key=_natural):
        content = json.loads(files[kind].decode("utf-8-sig"))
        if isinstance(content, dict):
            fields |= content
        else:
            more += content if isinstance(content, list) else [content]
    texts += [str(text) for text in more if isinstance(text, str)]
    if not any(text.strip() for text in texts):
        for name in (field for field in CAPTION_FIELDS if fields.get(field)):
            value = fields.pop(name)
            texts += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    label = files["cls"].decode("utf-8-sig").strip() or None if "cls" in files else None
    return Said([text for text in texts if text.strip()], label, fields)


def _natural(kind: str) -> tuple[bool, list[tuple[int, str]]]:
    """`txt` first, and txt2.txt before txt10.txt."""
    return "." in kind, [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", kind)]


# ---------------------------------------------------------------------------------------------------------- reading


def read_shards(
    source: Patterns | Mapping[str, Patterns],
    *,
    columns: Mapping[str, str] = {},
    lines: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
) -> Manifest:
    """Tars of images and captions, as they are, as a manifest whose images are read at random from the tars.

    The label is that of `.cls`, or the value `label` or `class` of the `.json`; where no item has one, each item is a
    class of its own, since a category that many items share does not tell them apart. What was lost or left out (a tar
    cut short, captions without an image) is counted in the manifest's `notes`, and logged.

    Args:
        source: shards, see `expand`; addresses are fetched once, into the cache. Or a mapping of train, val, test to
            such. `train_eval` and `val_eval` name those of them that are looked at while training: their rows are true
            in a column `watched`; those of `val_eval` may stand there alone.
        columns: vicinal's name -> that of a value in the `.json`, as for `read_table`; for instance
            `{"label": "product_id"}`.
        lines: each line of a `.txt` is a caption of its own.
        on_error: what to do with a file that is no tar and with a file that stands twice in one: stop ("raise"), or
            leave it out, counted ("skip").

    Raises:
        InputError: a pattern matches nothing, there is no whole item, or see `on_error`.
    """
    if not isinstance(source, Mapping):
        shards = {"": expand(source)}
    else:
        shards = {part: expand(patterns) for part, patterns in source.items()}
    local = {part: [_local(shard) for shard in found] for part, found in shards.items()}
    watched = {part: local.pop(part) for part in ("train_eval", "val_eval") if part in local}
    strange = [part for part in local if part and split_word(part) is None]
    if strange:
        raise InputError(f"{strange[0]!r} is no part; name the shards of train, val, test, train_eval, val_eval")
    part_of: dict[Path, str] = {}
    for part, tars in local.items():
        for tar in tars:
            if part_of.setdefault(tar, part) != part:
                raise InputError(f"{tar} is among the shards of {part_of[tar]} and of {part}; an item has one part")
    for tar in watched.get("val_eval", []):
        if part_of.setdefault(tar, "val") != "val":
            raise InputError(
                f"val_eval: {tar} is among the shards of {part_of[tar]}; what is selected on is not {part_of[tar]}"
            )
    if absent := [tar for tar in watched.get("train_eval", []) if part_of.get(tar) != "train"]:
        raise InputError(f"train_eval: {absent[0]} is not among the shards of train, so it would tell nothing of them")
    tars = list(part_of)
    name = ", ".join(map(str, source.values())) if isinstance(source, Mapping) else str(source)
    found = _indices(tars, on_error)
    root = _common(tars)
    rows, notes = _rows_of(found, part_of, root, lines)
    if not rows:
        raise InputError(
            f"{name}: no whole item in {len(tars):,} shards; an item is 0001.jpg with 0001.txt or 0001.json"
        )
    table = _as_table(rows, columns, name)
    if isinstance(source, Mapping):
        words = [split_word(part_of[tar]) for tar, index in found.items() for _ in range(len(index.table))]
        table = table.drop_columns(["split"] if "split" in table.column_names else [])
        table = table.append_column("split", pa.array(words, pa.string()))
    if watched:
        looked_at = {tar for tars in watched.values() for tar in tars}
        flags = [tar in looked_at for tar, index in found.items() for _ in range(len(index.table))]
        table = table.append_column("watched", pa.array(flags))
    for note in notes:
        log.warning("%s", note)
    return replace(Manifest.build(table, root, name=name), notes=tuple(notes))


def _local(shard: str) -> Path:
    return _fetched(shard) if urlsplit(shard).scheme in ("http", "https") else Path(shard)


def _common(tars: Sequence[Path]) -> Path:
    """The folder that the paths of a manifest start from."""
    parents = {tar.parent for tar in tars}
    if len(parents) == 1:
        return parents.pop()
    return Path(os.path.commonpath([parent.absolute() for parent in parents]))


@dataclass(frozen=True, slots=True)
class _Index:
    """What one tar holds: an item a row (key, member, offset, size, texts, label, fields), and what was lost."""

    table: pa.Table
    lost: Mapping[str, Any]


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("texts", pa.list_(pa.string())),
        ("label", pa.string()),
        ("fields", pa.string()),
    ]
)


def _indices(tars: Sequence[Path], on_error: Literal["raise", "skip"]) -> dict[Path, _Index]:
    """The index of each tar, read or made."""

    def one(tar: Path) -> _Index:
        try:
            return _index(tar)
        except InputError as error:
            if on_error == "raise":
                raise
            return _Index(_SCHEMA.empty_table(), {"no tar": str(error)})

    with ThreadPoolExecutor(min(8, len(tars))) as pool:
        found = dict(zip(tars, pool.map(one, tars), strict=True))
    if on_error == "raise":
        for tar, index in found.items():
            if twice := index.lost.get("twice"):
                raise InputError(
                    f"{tar}: the file {twice} is there twice, so it is not clear which of them belongs to its item; "
                    "write the shard anew with a key for each item, or set on_error=skip, which takes the first"
                )
    return found


def _index(tar: Path) -> _Index:
    try:
        stat = tar.stat()
    except OSError as error:
        raise InputError(f"{tar}: {error.strerror}") from error
    state = f"{INDEX} {stat.st_size} {stat.st_mtime_ns}"
    hidden = hashlib.sha256(str(tar.absolute()).encode()).hexdigest()[:32]
    places = (tar.with_name(f".{tar.name}.index"), _cache() / f"{hidden}.index")
    for place in places:
        try:
            table = pq.read_table(place)
            known = json.loads(table.schema.metadata[b"vicinal"])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            continue
        if known["state"] == state:
            return _Index(table.replace_schema_metadata(None), known["lost"])
    index = _walk(tar)
    known = {"state": state, "lost": dict(index.lost)}
    for place in places:
        part = place.with_name(f"{place.name}.{os.getpid()}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(
                index.table.replace_schema_metadata({"vicinal": json.dumps(known)}), part, compression="zstd"
            )
            part.replace(place)
        except OSError:  # a folder that cannot be written to: the next place; without any, the tar is walked each time
            continue
        break
    return index


def _cache() -> Path:
    return Path(os.environ.get("VICINAL_CACHE") or Path.home() / ".cache" / "vicinal") / "shards"


def _walk(tar: Path) -> _Index:
    """Go through a tar once; whatever is whole is kept."""
    items: dict[str, dict[str, tuple[str, int, int]]] = {}
    content: dict[str, dict[str, bytes]] = {}
    lost: dict[str, Any] = {}
    last = ""
    for member in _members(tar, lost):
        name = posixpath.normpath(member.name).lstrip("/")
        key, kind = split_key(name)
        if not kind or posixpath.basename(name).startswith("__") or "\n" in name:
            continue
        if kind in items.setdefault(key, {}):
            lost.setdefault("twice", name)
            continue
        items[key][kind] = (name, member.offset_data, member.size)
        last = key
        if member.content is not None:
            content.setdefault(key, {})[kind] = member.content
    if "cut at" in lost and items and not kinds_of(items[last]) >= kinds_of(next(iter(items.values()))):
        items.pop(last)  # the item that the cut went through
        lost["cut items"] = 1
    rows: list[dict[str, Any]] = []
    for key, files in items.items():
        if (picture := image_kind(list(files))) is None:
            if content.get(key):
                lost["no image"] = lost.get("no image", 0) + 1
                lost.setdefault("first without image", key)
            continue
        try:
            told = said(content.get(key, {}))
        except ValueError as error:
            lost["broken"] = lost.get("broken", 0) + 1
            lost.setdefault("first broken", f"{key}: {error}")
            continue
        fields = json.dumps(told.fields, ensure_ascii=False) if told.fields else None
        place = dict(zip(("member", "offset", "size"), files[picture], strict=True))
        rows.append({"key": key, **place, "texts": told.texts, "label": told.label, "fields": fields})
    return _Index(pa.Table.from_pylist(rows, _SCHEMA), lost)


def kinds_of(files: Mapping[str, object]) -> set[str]:
    """Which of image, txt, json and cls an item has."""
    ends = {kind.rpartition(".")[2] for kind in files}
    return (ends & {"txt", "json", "cls"}) | ({"image"} if image_kind(list(files)) else set())


class _File(NamedTuple):
    name: str
    offset_data: int
    size: int
    content: bytes | None  # of what is read with the index


def _members(path: Path, lost: dict[str, Any]) -> Iterator[_File]:
    """The files of a tar. Where it is cut or damaged they end, and `lost` says at which byte."""
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115  (entered below)
    except tarfile.ReadError as error:
        with path.open("rb") as start:
            packed = start.read(4).startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh"))
        mend = (
            "it is compressed: unpack it, so that it can be read at random"
            if packed
            else "replace it, or set on_error=skip"
        )
        raise InputError(f"{path} is no tar ({error}); {mend}") from error
    with tar:
        end = path.stat().st_size
        file = tar.fileobj
        assert file is not None
        while True:
            try:
                member = tar.next()
            except tarfile.TarError:
                break
            if member is None:
                break
            tar.members = []  # type: ignore[attr-defined]  # they would pile up
            if not member.isreg():
                continue
            if member.offset_data + member.size > end:
                break
            content = None
            if is_said(split_key(member.name)[1]):
                file.seek(member.offset_data)
                content = file.read(member.size)
            yield _File(member.name, member.offset_data, member.size, content)
        file.seek(tar.offset)  # tarfile stops without a word at a damaged header; a whole tar ends in zeros
        if file.read(512) != bytes(512):
            lost["cut at"] = min(tar.offset, end)


class _Row(NamedTuple):
    image: str
    part: str
    key: str
    own_class: str
    texts: list[str]
    label: str | None
    fields: dict[str, Any]


def _rows_of(
    found: Mapping[Path, _Index], part_of: Mapping[Path, str], root: Path, lines: bool
) -> tuple[list[_Row], list[str]]:
    """The items of all tars in order, and what is to be said of them."""
    rows: list[_Row] = []
    for tar, index in found.items():
        way = Path(os.path.relpath(tar, root)).as_posix() if tar.parent != root else tar.name
        for item in index.table.to_pylist():
            texts = item["texts"] or []
            if lines:
                texts = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
            image = Member(way, item["member"], item["offset"], item["size"]).path
            fields = json.loads(item["fields"]) if item["fields"] else {}
            rows.append(_Row(image, part_of[tar], item["key"], f"{way}/{item['key']}", texts, item["label"], fields))
    return rows, [*_lost(found), *_odd(rows)]


def _lost(found: Mapping[Path, _Index]) -> Iterator[str]:
    for tar, index in found.items():
        lost = index.lost
        if "no tar" in lost:
            yield f"left out: {lost['no tar']}"
        if "cut at" in lost:
            expected = recorded(str(tar.parent)).get(tar.name)
            missing = max((expected or 0) - len(index.table), int(lost.get("cut items", 0)))
            rest = f"{missing:,} item{'s' if missing != 1 else ''} lost" if expected or missing else "the rest is lost"
            whole = f"its {len(index.table):,} whole items are used"
            yield f"{tar} is cut or damaged at byte {lost['cut at']:,}: {whole}, {rest}"
        if "twice" in lost:
            yield f"{tar}: the file {lost['twice']} is there twice; the first is used"
        if "broken" in lost:
            first = lost["first broken"]
            yield f"{tar}: {lost['broken']:,} items left out whose text or values cannot be read (first: {first})"
    without = sum(index.lost.get("no image", 0) for index in found.values())
    if without:
        first = next(f"{tar.name}/{i.lost['first without image']}" for tar, i in found.items() if "no image" in i.lost)
        yield f"{without:,} item{'s' if without > 1 else ''} left out: words without an image (first: {first})"


def _odd(rows: Sequence[_Row]) -> Iterator[str]:
    silent = [row.image for row in rows if not row.texts]
    if 0 < len(silent) < len(rows):
        yield f"{len(silent):,} of {len(rows):,} images have no caption (first: {silent[0]})"
    repeated = [key for (_, key), count in Counter((row.part, row.key) for row in rows).items() if count > 1]
    if repeated:
        yield f"{len(repeated):,} keys stand in several shards (first: {repeated[0]}): taken as different items"


def _as_table(rows: Sequence[_Row], columns: Mapping[str, str], name: str) -> pa.Table:
    """The items as columns, called as vicinal calls them."""
    texts = [row.texts for row in rows]
    fields = list(dict.fromkeys(field for row in rows for field in row.fields))
    known: dict[str, Any] = {"image": [row.image for row in rows]}
    if any(row.label for row in rows):
        known["label"] = [row.label for row in rows]
    elif "label" not in columns and not any(field.lower() in LABEL_FIELDS for field in fields):
        known["label"] = [row.own_class for row in rows]
    if any(texts):
        known["text"] = [several[0] if several else None for several in texts]
        if any(len(several) > 1 for several in texts):
            known["captions"] = pa.array([several or None for several in texts], pa.list_(pa.string()))
    for field in fields:
        values = [row.fields.get(field) for row in rows]
        known[f"original_{field}" if field in known else field] = _column(values)
    if "label" not in known and "label" not in columns:
        columns = {**columns, "label": next(f for word in LABEL_FIELDS for f in fields if f.lower() == word)}
    return map_columns(pa.table(known), columns, name, labels=True)


def _column(values: Sequence[Any]) -> pa.Array:
    """Values in the type that holds them all; as words where none does."""
    simple = all(v is None or isinstance(v, str | int | float | bool) or _is_list(v) for v in values)
    if simple:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError):
            pass
    words = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return pa.array(words, pa.string())


def _is_list(value: Any) -> bool:  # noqa: ANN401  (a JSON value)
    return isinstance(value, list) and all(isinstance(one, str | int | float) for one in value)


# ------------------------------------------------------------------------------------------------------- addresses


def opened(address: str, *, timeout: float = 60.0) -> IO[bytes] | HTTPResponse:
    """The bytes behind an address or in a file, to be read in order. An address is tried three times.

    Raises:
        InputError: it cannot be had.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        try:
            return Path(address).open("rb")
        except OSError as error:
            raise InputError(f"{address}: {error.strerror}") from error
    for attempt in range(TRIES):
        try:
            stream: HTTPResponse = urlopen(address, timeout=timeout)
            return stream
        except HTTPError as error:
            error.close()
            if error.code < 500 or attempt == TRIES - 1:
                raise InputError(f"{address} cannot be had: {error}") from None
        except (URLError, OSError) as error:
            if attempt == TRIES - 1:
                raise InputError(f"{address} cannot be had: {error}") from error
        time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _fetched(address: str) -> Path:
    """A copy in the cache, made once."""
    place = _cache() / hashlib.sha256(address.encode()).hexdigest()[:32] / Path(urlsplit(address).path).name
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.{os.getpid()}.part")
        try:
            with opened(address) as source, part.open("wb") as target:
                wanted = int(source.headers.get("Content-Length") or -1)  # type: ignore[attr-defined]
                while block := source.read(1 << 20):
                    target.write(block)
            if wanted not in (-1, part.stat().st_size):
                raise InputError(f"{address}: {part.stat().st_size:,} of {wanted:,} bytes came; try again")
            part.replace(place)
        except OSError as error:
            raise InputError(f"{address} cannot be kept in {place.parent}: {error}") from error
        finally:
            part.unlink(missing_ok=True)
    return place


def recorded(folder: str) -> dict[str, int]:
    """How many items each shard of a folder (or of an address up to its last slash) has, by those who wrote them.

    `shards.json` of `write_shards`, or open_clip's `sizes.json`. Empty where neither is there.
    """
    for name in (COUNTS, "sizes.json"):
        address = f"{folder.rstrip('/')}/{name}"
        try:
            if urlsplit(address).scheme not in ("http", "https"):
                content = json.loads(Path(address).read_text(encoding="utf-8"))
            else:
                with urlopen(address, timeout=30) as stream:
                    content = json.loads(stream.read())
            return {shard: int(n["items"] if isinstance(n, dict) else n) for shard, n in content.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}


# ---------------------------------------------------------------------------------------------------------- writing


def write_shards(
    manifest: Manifest, pattern: Source, *, items: int = 1000, seed: int | None = 0, workers: int | None = None
) -> tuple[Path, ...]:
    """Write a manifest as shards; `read_shards` reads them back. Pictures are copied byte by byte.

    An item is `<number>.jpg`, its captions `<number>.txt`, `<number>.txt1.txt`, … and `<number>.json` with the other
    columns. `shards.json` beside the shards tells the number of items, the bytes and the SHA-256 of each. Rows of one
    `group` stand in one shard. Shards of an earlier writing by the same pattern are replaced; a shard is whole or not
    there.

    Args:
        manifest: N rows.
        pattern: the path of a shard with its number as `%06d`, for instance `shards/train_%06d.tar`.
        items: a shard; a group larger than that makes a larger shard.
        seed: of the shuffle of the rows (of their groups) before they are written, as a stream wants them; None keeps
            their order.
        workers: processes that write; None: `default_workers()`.

    Returns:
        The shards.

    Raises:
        InputError: no number in the pattern, shards in its place that something else wrote, or a picture that cannot be
            read.
    """
    path = Path(pattern).expanduser()
    if len(re.findall(r"%0?\d*d", path.name)) != 1 or path.suffix != ".tar":
        raise InputError(
            f"{pattern}: write the number of a shard as %06d, for instance {path.with_name('train_%06d.tar')}"
        )
    if items < 1:
        raise InputError(f"items={items} must be at least 1")
    packs = _packs(manifest, items, seed)
    paths = [path.with_name(path.name % number) for number in range(len(packs))]
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_earlier(path)
    jobs = []
    first = 0
    written = _items(manifest)
    for target, rows in zip(paths, packs, strict=True):
        jobs.append((target, first, [written(row) for row in rows]))
        first += len(rows)
    workers = min(default_workers() if workers is None else workers, len(jobs))
    if workers > 1:
        with warnings.catch_warnings(), ProcessPoolExecutor(workers) as pool:
            # Python 3.12 warns of forking beside threads, which torch always has. These processes only copy bytes.
            warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
            sums = list(pool.map(_write_one, *zip(*jobs, strict=True)))
    else:
        sums = [_write_one(*job) for job in jobs]
    about = _noted(path.parent) | {target.name: counts for target, counts in zip(paths, sums, strict=True)}
    _note(path.parent, about)
    return tuple(paths)


def _packs(manifest: Manifest, items: int, seed: int | None) -> list[list[int]]:
    """The rows of each shard: groups stay whole."""
    groups: dict[object, list[int]] = {}
    column = manifest.column("group") if "group" in manifest.names() else [None] * len(manifest)
    for row, group in enumerate(column):
        groups.setdefault(("row", row) if group is None else group, []).append(row)
    members = list(groups.values())
    if seed is not None:
        members = [members[i] for i in np.random.default_rng(seed).permutation(len(members))]
    packs: list[list[int]] = [[]]
    for rows in members:
        if packs[-1] and len(packs[-1]) + len(rows) > items:
            packs.append([])
        packs[-1] += rows
    return packs


class _Written(NamedTuple):
    image: str
    texts: list[str]
    fields: str


def _items(manifest: Manifest) -> Callable[[int], _Written]:
    """What is written of a row."""
    texts = manifest.captions() if {"text", "captions"} & set(manifest.names()) else [[]] * len(manifest)
    others = [name for name in manifest.names() if name not in ("image", "text", "captions", "_copy")]
    fields = manifest.table.select(others).to_pylist()

    def one(row: int) -> _Written:
        kept = {name: value for name, value in fields[row].items() if value is not None}
        return _Written(str(manifest.path(row)), texts[row], json.dumps(kept, ensure_ascii=False, default=str))

    return one


def _write_one(path: Path, first: int, items: Sequence[_Written]) -> dict[str, int | str]:
    """One shard, whole or not at all; returns what is noted of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, item in enumerate(items, first):
                picture = read_bytes(item.image)
                files = {_ending(picture, item.image): picture}
                for i, text in enumerate(item.texts):
                    files[f"txt{i}.txt" if i else "txt"] = text.encode()
                files["json"] = item.fields.encode()
                for kind, content in files.items():
                    info = tarfile.TarInfo(f"{number:09d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        noted: dict[str, int | str] = {"items": len(items), "bytes": part.stat().st_size, "sha256": digest}
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return noted


def _ending(picture: bytes, path: str) -> str:
    """The kind of a picture by its first bytes, as decoders see it; else by its name."""
    for start, kind in ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp")):
        if picture.startswith(start):
            return kind
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return "webp"
    member = Member.of(path)
    return Path(member.name if member else path).suffix.lower().lstrip(".") or "img"


def _noted(folder: Path) -> dict[str, Any]:
    """What `shards.json` says, without the shards that are no longer there."""
    try:
        content = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / COUNTS} cannot be read ({error}); remove it, or choose another folder") from error
    if not isinstance(content, dict) or not all(isinstance(n, dict) and "items" in n for n in content.values()):
        raise InputError(f"{folder / COUNTS} is not by vicinal; choose another folder")
    return {name: noted for name, noted in content.items() if (folder / name).is_file()}


def _note(folder: Path, content: Mapping[str, Any]) -> None:
    part = folder / f".{COUNTS}.{os.getpid()}.part"
    part.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n", encoding="utf-8")
    part.replace(folder / COUNTS)


def _clear_earlier(path: Path) -> None:
    """Remove the shards of an earlier writing by this pattern; refuse to touch what something else wrote."""
    noted = _noted(path.parent)
    before, number, after = re.split(r"(%0?\d*d)", path.name)
    pattern = re.compile(rf"{re.escape(before)}\d+{re.escape(after)}")
    mine = [tar for tar in path.parent.glob("*.tar") if pattern.fullmatch(tar.name)]
    foreign = sorted(tar.name for tar in mine if tar.name not in noted)
    if foreign:
        raise InputError(
            f"{path.parent} holds {', '.join(foreign[:FEW])}, of which no {COUNTS} tells: remove them, or choose "
            f"another name than {before}{number}{after}"
        )
    for tar in mine:
        tar.unlink()
        tar.with_name(f".{tar.name}.index").unlink(missing_ok=True)
