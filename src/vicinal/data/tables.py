"""Tables in files: CSV in any dialect, TSV, JSON Lines, Parquet; read to a Manifest, and written.

Letters: N rows.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from jaxtyping import Float

from vicinal.data.manifest import BOX, IMAGE_ENDINGS, Manifest, box_array, box_values
from vicinal.types import InputError

__all__ = ["COLUMNS", "map_columns", "read_rows", "read_table", "write_table"]

Source = str | Path


PARQUET = (".parquet", ".pq")
JSON_LINES = (".jsonl", ".ndjson")

# what tables call the columns; compared in lower case. `columns` of read_table names any other
COLUMNS = {
    "image": (
        *("image", "image_path", "imagepath", "img_path", "filepath", "file_path", "path"),
        *("filename", "file_name", "file", "img", "image_file", "image_name"),
    ),
    "label": ("label", "class", "category", "class_name", "classname", "category_name", "label_name", "target"),
    "text": ("text", "caption"),
    "group": ("group", "group_id"),
    "split": ("split", "subset", "partition"),
}
CORNERS = (
    *(("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax")),
    *(("x_min", "y_min", "x_max", "y_max"), ("left", "top", "right", "bottom")),
)
CORNER_AND_SIZE = (("x", "y", "w", "h"), ("x", "y", "width", "height"), ("bbox_x", "bbox_y", "bbox_w", "bbox_h"))
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def read_table(
    path: Source | Mapping[str, Source],
    *,
    columns: Mapping[str, str] = {},
    root: Source | None = None,
    labels: bool = True,
    check_files: bool = True,
) -> Manifest:
    """A table with a row for each image: CSV (any of , ; tab |), TSV, JSON Lines, a JSON list, or Parquet.

    A `.db` is what `vicinal prepare --format logos` wrote: see `vicinal.data.logos.read_logos`.

    Needed are an image column and a label column, by any of the names in `COLUMNS`. Boxes may stand in one column `box`
    (four numbers) or in four. In a CSV every value is a word, so that the label 007 stays 007.

    Args:
        path: the file, or a mapping of train, val, test to one file each.
        columns: vicinal's name (image, label, text, box, box_xywh, group, split) -> the table's. `box` is x0, y0, x1,
            y1 and `box_xywh` x, y, width, height: one column, or four with commas between. An empty name leaves a
            column out.
        root: the folder that image paths start from. None: the folder of the table.
        labels: False reads a table that has no label column.
        check_files: False leaves missing image files to whoever reads them.

    Raises:
        InputError: the file cannot be read or parsed, a needed column is missing or could be either of two, a row lacks
            its image or label, a box is not one, or image files are missing.
    """
    if isinstance(path, Mapping):
        return Manifest.united(
            {
                part: read_table(one, columns=columns, root=root, labels=labels, check_files=check_files)
                for part, one in path.items()
            }
        )
    path = Path(path).expanduser()
    if path.suffix.lower() in (".db", ".sqlite"):
        if columns or root is not None:
            raise InputError(f"{path}: a database of logos has its own columns and paths; leave columns and root out")
        from vicinal.data.logos import read_logos

        return read_logos(path)
    name = str(path)
    table = read_rows(path)
    known = _saved_by_us(table)
    table = map_columns(table.replace_schema_metadata(None), columns, name, labels)
    if known and not columns:
        root = path.parent / known["root"] if root is None else root
        manifest = Manifest.build(table, root, classes=known["classes"], padding=known["padding"], name=name)
    else:
        manifest = Manifest.build(table, path.parent if root is None else root, name=name)
    if check_files:
        manifest.refuse_missing(name)
    return manifest


def read_rows(path: Path) -> pa.Table:
    """Whatever the file holds, as an Arrow table."""
    if not path.exists():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        raise InputError(f"{path} does not exist" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        if path.is_dir():
            if not any(path.rglob("*.parquet")):
                raise InputError(f"{path} is a folder without Parquet files; folders of images are read by read_folder")
            return pq.read_table(path)
        match path.suffix.lower():
            case suffix if suffix in PARQUET:
                return pq.read_table(path)
            case suffix if suffix in JSON_LINES:
                return _read_json_lines(path)
            case ".json":
                return _read_json_list(path)
            case ".xlsx" | ".xls" | ".ods":
                raise InputError(f"{path} is a spreadsheet; save it as CSV")
            case _:
                return _read_delimited(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_delimited(path: Path) -> pa.Table:
    """A CSV in any of its dialects, every column as words."""
    with pa.input_stream(str(path), compression="detect") as stream:
        head = stream.read(1 << 16)
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    text = head.decode("utf-16" if encoding == "utf-16" else "utf-8-sig", errors="replace")
    if not text.strip():
        raise InputError(f"{path} is empty")
    delimiter, header = _sniffed(text, whole=len(head) < 1 << 16, tabs=path.suffix.lower() == ".tsv")
    twice = sorted({h for h in header if h and header.count(h) > 1})
    if twice:
        raise InputError(f"{path}: two columns are called {twice[0]!r}; rename one")
    try:
        table = pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(encoding=encoding),
            parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {_csv_fault(path, delimiter, encoding, len(header)) or error}") from error
    table = table.select([i for i, column in enumerate(table.column_names) if column.strip()])  # a nameless index
    empty = [pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column) for column in table.columns]
    return pa.table(dict(zip((c.strip() for c in table.column_names), empty, strict=True)))


def _sniffed(text: str, *, whole: bool, tabs: bool) -> tuple[str, list[str]]:
    """The separator that cuts the header and the rows after it into the same number of fields, and the header."""
    best = ("\t" if tabs else ",", 0, 0)
    headers = {}
    for delimiter in ("\t", ",", ";", "|") if tabs else (",", ";", "\t", "|"):
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
        rows = rows[:50] if whole or len(rows) < 3 else rows[:-1][:50]  # the last may be cut off
        headers[delimiter] = rows[0]
        agree = sum(len(row) == len(rows[0]) for row in rows)
        if len(rows[0]) > 1 and (agree, len(rows[0])) > best[1:]:
            best = (delimiter, agree, len(rows[0]))
    return best[0], headers[best[0]]


def _csv_fault(path: Path, delimiter: str, encoding: str, fields: int) -> str:
    """The first line that is wrong, in words; empty if none is found."""
    with pa.input_stream(str(path), compression="detect") as stream:
        try:
            lines = io.TextIOWrapper(stream, encoding=encoding, newline="")
            reader = csv.reader(lines, delimiter=delimiter)
            for row in reader:
                if row and len(row) != fields:
                    return (
                        f"line {reader.line_num} has {len(row)} fields, the header has {fields}. A value that holds "
                        f'{delimiter!r} must stand in "quotes"'
                    )
        except UnicodeDecodeError as error:
            return f"it is not in UTF-8 ({error.reason} at byte {error.start} of a block); save it as UTF-8"
        except csv.Error as error:
            return str(error)
    return ""


def _read_json_lines(path: Path) -> pa.Table:
    """One JSON object a line. Columns whose first value is a word stay words, dates and all."""
    with path.open(encoding="utf-8-sig") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        first = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line 1 is not JSON ({error})") from error
    if not isinstance(first, dict):
        raise InputError(f"{path}: line 1 holds a {type(first).__name__}; each line is an object with named values")
    words = pa.schema([(key, pa.string()) for key, value in first.items() if isinstance(value, str)])
    try:
        return pajson.read_json(path, parse_options=pajson.ParseOptions(explicit_schema=words))
    except pa.ArrowInvalid as error:
        for number, text in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            try:
                row = json.loads(text) if text.strip() else {}
            except ValueError as fault:
                raise InputError(f"{path}: line {number} is not JSON ({fault})") from error
            for key, value in row.items():
                if key in first and None not in (value, first[key]) and isinstance(value, str) != (key in words.names):
                    raise InputError(
                        f"{path}: line {number} has {key} = {value!r}, the first line has {first[key]!r}; "
                        "make both words or both numbers"
                    ) from error
        raise


def _read_json_list(path: Path) -> pa.Table:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); a file with one object a line is called .jsonl") from error
    if isinstance(rows, dict) and "annotations" in rows:
        raise InputError(f"{path} is a COCO file; it is read by read_coco (in a recipe: `data: {{coco: …}}`)")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} should hold a list of objects, one an image")
    return pa.Table.from_pylist(rows)


def _saved_by_us(table: pa.Table) -> dict[str, Any]:
    """What `Manifest.save` noted beside the columns."""
    metadata = table.schema.metadata or {}
    known: dict[str, Any] = json.loads(metadata.get(b"vicinal", b"{}"))
    return known


def map_columns(table: pa.Table, columns: Mapping[str, str], name: str, labels: bool) -> pa.Table:
    """The table with its columns called as vicinal calls them."""
    there = table.column_names
    lower = {c.lower(): c for c in reversed(there)}
    known = (*COLUMNS, "box", "box_xywh")
    for ours, theirs in columns.items():
        if ours not in known:
            near = difflib.get_close_matches(ours, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise InputError(f"columns: {ours!r} is none of vicinal's names{hint}")
        absent = [c for c in theirs.split(",") if theirs and theirs not in there and c.strip() not in there]
        if absent:
            raise InputError(f"{name} has no column {absent[0].strip()!r} (columns.{ours}); it has {', '.join(there)}")
    asked_for = {part.strip() for theirs in columns.values() for part in (theirs, *theirs.split(","))}
    chosen: dict[str, str] = {}
    for ours, aliases in COLUMNS.items():
        candidates = [lower[alias] for alias in aliases if alias in lower and lower[alias] not in asked_for]
        needed = ours == "image" or (ours == "label" and labels)
        if ours in columns:
            if columns[ours]:
                chosen[ours] = columns[ours]
        elif ours in there and ours not in asked_for:
            chosen[ours] = ours
        elif len(candidates) == 1:
            chosen[ours] = candidates[0]
        elif needed:
            raise InputError(f"{name} {_unclear(ours, candidates, there)}")
    if not labels:
        chosen.pop("label", None)
    box, taken = _box_column(table, columns, lower, name)
    taken += list(chosen.values())
    renamed = {ours: table[theirs] for ours, theirs in chosen.items()} | ({"box": box} if box is not None else {})
    for column in there:
        if column not in taken:
            # a column that another took the name of: label, where columns says label=category
            renamed[f"original_{column}" if column in renamed or column in known else column] = table[column]
    return pa.table(renamed)


def _unclear(ours: str, candidates: Sequence[str], there: Sequence[str]) -> str:
    if candidates:
        return (
            f"has {' and '.join(candidates)}, each of which may be the {ours}: choose one, "
            f"columns={{{ours!r}: {candidates[0]!r}}}"
        )
    if any(c.lower().endswith(IMAGE_ENDINGS) for c in there):
        return f"begins with data, not with names: add a first line such as {','.join(('image', 'label'))}"
    example = next((c for c in there if c.lower() not in COLUMNS["image"]), there[0] if there else "…")
    return (
        f"has no {ours} column. It has {', '.join(there)}; say which one it is, for example "
        f"columns={{{ours!r}: {example!r}}}" + (", or read it by labels=False" if ours == "label" else "")
    )


def _box_column(
    table: pa.Table, columns: Mapping[str, str], lower: Mapping[str, str], name: str
) -> tuple[pa.ChunkedArray | None, list[str]]:
    """The boxes as corners, and the columns that they were made of."""
    given = [ours for ours in ("box", "box_xywh") if ours in columns]
    if len(given) == 2:
        raise InputError("columns: give box or box_xywh, not both")
    if given:
        theirs, size = columns[given[0]], given[0] == "box_xywh"
        parts = [theirs] if theirs in table.column_names else [c.strip() for c in theirs.split(",") if c.strip()]
        if not parts:
            return None, []
    elif "box" in table.column_names:
        parts, size = ["box"], False
    elif "box_xywh" in table.column_names:
        parts, size = ["box_xywh"], True
    else:
        sets = [(s, size) for size, kind in enumerate((CORNERS, CORNER_AND_SIZE)) for s in kind if set(s) <= set(lower)]
        if len(sets) > 1:
            raise InputError(
                f"{name} may hold boxes in {' or '.join(','.join(s) for s, _ in sets)}: choose, "
                f"columns={{'box': {','.join(sets[0][0])!r}}}, or columns={{'box': ''}} for none"
            )
        if not sets:
            vague = [lower[c] for c in ("bbox", "bounding_box") if c in lower]
            if vague:
                raise InputError(
                    f"{name}: the column {vague[0]!r} may be x0, y0, x1, y1 or x, y, width, height. Say "
                    f"columns={{'box': {vague[0]!r}}} or columns={{'box_xywh': {vague[0]!r}}}; columns={{'box': ''}} "
                    "takes whole pictures"
                )
            return None, []
        parts, size = [lower[c] for c in sets[0][0]], bool(sets[0][1])
    if len(parts) not in (1, 4):
        raise InputError(f"columns: a box is one column or four, not {len(parts)} ({', '.join(parts)})")
    boxes = _parsed_boxes(table[parts[0]], parts[0], name) if len(parts) == 1 else _four_columns(table, parts, name)
    if size:
        boxes[:, 2:] += boxes[:, :2]
    return box_values(boxes), parts


def _parsed_boxes(column: pa.ChunkedArray, what: str, name: str) -> Float[np.ndarray, "N 4"]:
    """Boxes of one column, as lists of numbers or as text such as "1,2,30,40" or "[1 2 30 40]"; NaN where empty."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        four = r"[,;\s]+".join([NUMBER] * 4)
        good = pc.match_substring_regex(column, rf"^\s*[\[(]?\s*{four}\s*[\])]?\s*$")
        bad = np.flatnonzero(pc.fill_null(pc.invert(good), False).to_numpy())
        if len(bad):
            raise InputError(f"{name}: row {bad[0] + 1} has the box {column[int(bad[0])].as_py()!r}; give four numbers")
        bare = pc.utf8_trim(column, " \t[]()")
        column = pc.split_pattern_regex(bare, r"[,;\s]+").cast(pa.list_(pa.float64()))
    try:
        return box_array(pa.table({"box": column.cast(BOX)}))
    except pa.ArrowException as error:
        raise InputError(f"{name}: column {what!r} should hold four numbers a row ({error})") from error


def _four_columns(table: pa.Table, parts: Sequence[str], name: str) -> Float[np.ndarray, "N 4"]:
    corners = np.empty((table.num_rows, 4))
    for i, part in enumerate(parts):
        try:
            values = pc.utf8_trim_whitespace(table[part]) if pa.types.is_string(table[part].type) else table[part]
            corners[:, i] = values.cast(pa.float64()).to_numpy()
        except pa.ArrowException as error:
            raise InputError(f"{name}: column {part!r} should hold numbers ({error})") from error
    some = np.isnan(corners)
    torn = np.flatnonzero(some.any(1) & ~some.all(1))
    if len(torn):
        raise InputError(f"{name}: row {torn[0] + 1} has only a part of a box: {', '.join(parts)} go together")
    return corners


def write_table(manifest: Manifest, path: Source) -> None:
    """Write a manifest as CSV, TSV, JSON Lines or Parquet, by the name's end; `read_table` reads it back.

    Image paths are written relative to the table's folder. JSON Lines and Parquet keep the kinds of further columns,
    CSV makes words of them; only Parquet keeps an order of classes that is not the sorted one, and the padding.

    Raises:
        InputError: another ending, or a column that CSV cannot hold.
    """
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    if suffix in PARQUET:
        manifest.save(path)
        return
    if suffix not in (".csv", ".tsv", *JSON_LINES):
        raise InputError(f"{path}: tables are written as .csv, .tsv, .jsonl or .parquet")
    table = manifest.rebased(path.parent).table.drop_columns(["_copy"] if "_copy" in manifest.names() else [])
    if not manifest.classes:
        table = table.drop_columns(["label"])
    part = path.with_name(f".{path.name}.part")
    if suffix in JSON_LINES:
        with part.open("w", encoding="utf-8") as file:
            for batch in table.to_batches(max_chunksize=10_000):
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in batch.to_pylist())
    else:
        if "box" in table.column_names:
            corners = box_array(table)
            table = table.drop_columns(["box"])
            for i, corner in enumerate(CORNERS[0]):
                table = table.append_column(corner, pa.array(corners[:, i], mask=np.isnan(corners[:, i])))
        try:
            options = pacsv.WriteOptions(delimiter="\t" if suffix == ".tsv" else ",")
            pacsv.write_csv(table, part, options)
        except pa.ArrowException as error:
            raise InputError(f"{path}: CSV cannot hold these columns ({error}); write .jsonl or .parquet") from error
    part.replace(path)
