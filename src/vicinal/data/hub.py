"""Data sets of the Hugging Face Hub, or saved by `datasets`; read to a Manifest, their pictures kept as they are."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from vicinal.data.manifest import Manifest, split_word
from vicinal.data.tables import map_columns
from vicinal.types import InputError

__all__ = ["read_hub"]

Source = str | Path


def read_hub(
    name: Source | Mapping[str, Source],
    *,
    split: str | None = None,
    columns: Mapping[str, str] = {},
    config: str | None = None,
    revision: str | None = None,
    cache_dir: Source | None = None,
) -> Manifest:
    """A data set of the Hugging Face Hub, or one saved by `datasets` (a folder of `save_to_disk`, or of Parquet files).

    The pictures are written out as they are, never encoded anew, to files named by their content below `cache_dir`; a
    second reading finds them there. A label that is a number of a `ClassLabel` becomes its name.

    Args:
        name: "owner/name", a local folder, or a mapping of train, val, test to one each. In a mapping, a data set that
            has splits of its own gives that of the same word.
        split: which of its splits; None reads all of them, into the column `split`.
        columns: vicinal's name -> the data set's, as for `read_table`. The image column is the one that holds pictures.
        config: which configuration ("name" in `datasets`), where it has several.
        revision: a branch, tag or commit, for a result that can be had again.
        cache_dir: where the pictures go. None: $VICINAL_CACHE, else ~/.cache/vicinal.

    Raises:
        InputError: `datasets` is not installed, the data set cannot be had, has no such split, or no picture column.
    """
    if isinstance(name, Mapping):
        return Manifest.united(
            {
                part: read_hub(
                    one,
                    split=_own_split(_load_hub(one, config, revision), part) if split is None else split,
                    columns=columns,
                    config=config,
                    revision=revision,
                    cache_dir=cache_dir,
                )
                for part, one in name.items()
            }
        )
    parts = _load_hub(name, config, revision)
    if split is not None and split not in parts:
        raise InputError(f"{name} has no split {split!r}; it has {', '.join(parts)}")
    parts = parts if split is None else {split: parts[split]}
    home = Path(os.environ.get("VICINAL_CACHE") or Path.home() / ".cache" / "vicinal")
    root = Path(cache_dir).expanduser() if cache_dir is not None else home / "images"
    tables = {part: _hub_table(rows, root, columns, f"{name} ({part})") for part, rows in parts.items()}
    if split is None and len(tables) > 1:
        for part, table in tables.items():
            tables[part] = table.drop_columns(["split"] if "split" in table.column_names else []).append_column(
                "split", pa.array([split_word(part) or part] * table.num_rows)
            )
    table = pa.concat_tables(tables.values(), promote_options="default")
    manifest = Manifest.build(table, root, name=str(name))
    manifest.refuse_missing(str(name))
    return manifest


def _load_hub(name: Source, config: str | None, revision: str | None) -> dict[str, Any]:
    """The splits of a data set, by name."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("data sets of the Hub need `datasets`: pip install 'vicinal[hub]'") from error
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.exists() else str(name), config, revision=revision)
    except Exception as error:  # `datasets` raises a dozen kinds, those of the network and of every file format
        raise InputError(
            f"the data set {name} cannot be had ({type(error).__name__}: {error}). Give owner/name as on the Hub, or a "
            "folder; without a network, a folder that `datasets` saved elsewhere by save_to_disk"
        ) from error
    return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}


def _own_split(parts: Mapping[str, Any], part: str) -> str:
    """The split of a data set that stands for `part`: its only one, or the one of the same word."""
    same = [own for own in parts if split_word(own) == split_word(part)]
    if len(parts) > 1 and len(same) != 1:
        raise InputError(f"{part}: the data set has the splits {', '.join(parts)}, and not just one for {part}")
    return same[0] if len(parts) > 1 else next(iter(parts))


def _hub_table(rows: Any, root: Path, columns: Mapping[str, str], name: str) -> pa.Table:  # noqa: ANN401, a Dataset
    """A split as a table; its pictures as files below `root`."""
    import datasets

    features = rows.features
    pictures = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    chosen = columns.get("image") or (pictures[0] if len(pictures) == 1 else None)
    if chosen is None or chosen not in features:
        kinds = ", ".join(f"{c} ({type(feature).__name__})" for c, feature in features.items())
        which = f"has no column {chosen!r}" if chosen else f"has {len(pictures)} columns of pictures"
        raise InputError(f"{name} {which}; choose by columns={{'image': …}} among {kinds}")
    fields: dict[str, Any] = {}
    for column, feature in features.items():
        if isinstance(feature, datasets.Image):
            continue
        values = rows.with_format("arrow")[column]
        values = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array(rows.data.column(column).chunks)
        if isinstance(feature, datasets.ClassLabel):
            at = pc.if_else(pc.less(values, 0), pa.scalar(None, pa.int64()), values.cast(pa.int64()))  # -1: no label
            values = pc.take(pa.chunked_array([pa.array(feature.names, pa.string())]), at)
        fields[column] = values
    if isinstance(features[chosen], datasets.Image):
        fields[chosen] = _written_pictures(rows.cast_column(chosen, datasets.Image(decode=False)), chosen, root, name)
    return map_columns(pa.table(fields), {**columns, "image": chosen}, name, labels=True)


def _written_pictures(rows: Any, column: str, root: Path, name: str) -> list[str]:  # noqa: ANN401, a Dataset
    """Where each row's picture lies: where it was already, or in a file named by its content, written here."""
    root.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, row in enumerate(rows.select_columns([column])):
        value = row[column] or {}
        content, path = value.get("bytes"), value.get("path")
        if content is None:
            if not path:
                raise InputError(f"{name}: row {number + 1} has no picture in {column!r}")
            paths.append(Path(path).resolve().as_posix())
            continue
        digest = hashlib.sha256(content).hexdigest()
        file = f"{digest[:2]}/{digest[:32]}{_extension(content)}"
        target = root / file
        if not target.is_file():
            target.parent.mkdir(exist_ok=True)
            part = target.with_name(f".{target.name}.{os.getpid()}")
            part.write_bytes(content)
            part.replace(target)
        paths.append(file)
    return paths


def _extension(content: bytes) -> str:
    """The file name's end for a picture's first bytes; decoders look at the bytes, people at the name."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}.get(
                image.format or "", ".img"
            )
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return ".img"
