"""Sources: the same twelve pictures out of every format, round trips, and each mistake by file, row or key."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vicinal.data.coco import _spans
from vicinal.data.manifest import Manifest
from vicinal.data.sources import (
    prepare,
    read_coco,
    read_folder,
    read_hub,
    read_shards,
    read_table,
    read_voc,
    write_coco,
    write_shards,
    write_table,
    write_voc,
)
from vicinal.data.splits import class_disjoint
from vicinal.types import InputError

anytime = settings(deadline=None, max_examples=100)  # nothing is timed here

CLASSES = ("Apple, red", 'Café "noir"', "pear")


def paint(path: Path, seed: int, size: tuple[int, int] = (24, 16), orientation: int = 1) -> None:
    """A picture like no other: smooth noise, so that JPEG keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, **({"exif": exif} if orientation != 1 else {}))


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four pictures: PNG and JPEG, one of them turned by its EXIF tag."""
    root = tmp_path_factory.mktemp("twelve") / "photos"
    for c, name in enumerate(CLASSES):
        for i in range(4):
            paint(
                root / name / f"{i}.{'jpg' if i % 2 else 'png'}", 10 * c + i, orientation=6 if (c, i) == (0, 1) else 1
            )
    return root


@pytest.fixture(scope="module")
def true(twelve: Path) -> Manifest:
    images = [f"{name}/{i}.{'jpg' if i % 2 else 'png'}" for name in CLASSES for i in range(4)]
    return Manifest.build({"image": images, "label": [name for name in CLASSES for _ in range(4)]}, twelve)


def delimited(separator: str, suffix: str, encoding: str = "utf-8") -> Callable[[Manifest, Path], Manifest]:
    def source(true: Manifest, work: Path) -> Manifest:
        quoted = [[f'"{w}"' for w in (i, lab.replace('"', '""'))] for i, lab in zip(*columns(true), strict=True)]
        quoted = [[i.replace('Café "noir"', 'Café ""noir""'), lab] for i, lab in quoted]
        lines = [separator.join(["file_name", "class"]), *(separator.join(row) for row in quoted)]
        path = work / f"table{suffix}"
        content = ("\n".join(lines) + "\n").encode(encoding)
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
        return read_table(path, root=true.root)

    return source


def columns(m: Manifest) -> tuple[list[str], list[str]]:
    return m.column("image"), m.column("label")


def written(
    name: str, read: Callable[..., Manifest], write: Callable[[Manifest, Path], None]
) -> Callable[..., Manifest]:
    def source(true: Manifest, work: Path) -> Manifest:
        write(true, work / name)
        return read(work / name)

    return source


def as_json_list(true: Manifest, work: Path) -> Manifest:
    (work / "t.json").write_text(json.dumps([{"path": i, "category": c} for i, c in zip(*columns(true), strict=True)]))
    return read_table(work / "t.json", root=true.root)


def as_foreign_parquet(true: Manifest, work: Path) -> Manifest:
    image, label = columns(true)
    table = pa.table({"filepath": pa.array(image, pa.large_string()), "target": pa.array(label).dictionary_encode()})
    (work / "parts").mkdir()
    pq.write_table(table.slice(0, 5), work / "parts" / "0.parquet")
    pq.write_table(table.slice(5), work / "parts" / "1.parquet")
    return read_table(work / "parts", root=true.root)


def as_folder_of_links(true: Manifest, work: Path) -> Manifest:
    (work / "linked").symlink_to(true.root, target_is_directory=True)
    return read_folder(work / "linked")


def hub_rows(true: Manifest, *, inside: bool) -> Any:  # noqa: ANN401
    import datasets

    paths = [str(true.path(i)) for i in range(len(true))]
    pictures = [{"bytes": Path(p).read_bytes(), "path": None} for p in paths] if inside else paths
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(true.classes[::-1]))}
    )
    labels = [len(true.classes) - 1 - n for n in true.labels().tolist()]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def as_hub_on_disk(true: Manifest, work: Path) -> Manifest:
    hub_rows(true, inside=True).save_to_disk(work / "saved")
    return read_hub(work / "saved", cache_dir=work / "cache")


def as_hub_paths(true: Manifest, work: Path) -> Manifest:
    hub_rows(true, inside=False).save_to_disk(work / "saved")
    return read_hub(work / "saved", cache_dir=work / "cache")


def as_hub_parquet(true: Manifest, work: Path) -> Manifest:
    (work / "hub").mkdir()
    hub_rows(true, inside=True).to_parquet(work / "hub" / "train-00000-of-00001.parquet")
    return read_hub(work / "hub", cache_dir=work / "cache")


def as_shards(true: Manifest, work: Path) -> Manifest:
    write_shards(true, work / "shards" / "part_%03d.tar", items=5, seed=None)
    return read_shards(work / "shards" / "part_{000..002}.tar")


def as_foreign_shards(true: Manifest, work: Path) -> Manifest:
    """By another tool: folders in the tar, `./` before the names, the label in `.cls`."""
    for shard in range(3):
        with tarfile.open(work / f"{shard}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for row in range(4 * shard, 4 * shard + 4):
                picture = true.path(row)
                tar.add(picture, f"./{'deep/' * 30}{row:04d}{picture.suffix.upper()}")
                label = true.column("label")[row].encode()
                info = tarfile.TarInfo(f"./{'deep/' * 30}{row:04d}.cls")
                info.size = len(label)
                tar.addfile(info, io.BytesIO(label))
    return read_shards(work)


SOURCES: dict[str, Callable[[Manifest, Path], Manifest]] = {
    "folder": lambda true, _: read_folder(true.root),
    "folder through a link": as_folder_of_links,
    "comma": delimited(",", ".csv"),
    "semicolon": delimited(";", ".csv"),
    "tab": delimited("\t", ".tsv"),
    "tab called csv": delimited("\t", ".csv"),
    "bar": delimited("|", ".txt"),
    "byte order mark": delimited(",", ".csv", "utf-8-sig"),
    "utf-16": delimited("\t", ".csv", "utf-16"),
    "gzip": delimited(",", ".csv.gz"),
    "csv written": written("out.csv", read_table, write_table),
    "tsv written": written("out.tsv", read_table, write_table),
    "jsonl written": written("out.jsonl", read_table, write_table),
    "parquet written": written("out.parquet", read_table, write_table),
    "manifest": written("out.pq", Manifest.load, Manifest.save),
    "json list": as_json_list,
    "foreign parquet": as_foreign_parquet,
    "coco": written("out.json", read_coco, write_coco),
    "voc": written("voc", read_voc, write_voc),
    "shards written": as_shards,
    "foreign shards": as_foreign_shards,
    "hub, saved to disk": as_hub_on_disk,
    "hub, paths": as_hub_paths,
    "hub, parquet": as_hub_parquet,
}


def test_every_source_is_here():
    assert len(SOURCES) == 24


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:datasets")
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_reads_the_same_twelve_pictures(name: str, twelve: Path, true: Manifest, tmp_path: Path):
    m = SOURCES[name](true, tmp_path)
    assert len(m) == 12
    assert m.classes == CLASSES
    assert m.labels().tolist() == true.labels().tolist()
    assert not m.missing().any()
    assert len(set(m.ids())) == 12
    for row in range(12):
        assert torch.equal(m.image(row), true.image(row))
    if not name.startswith(("hub", "voc", "shards", "foreign shards")):  # these hold copies
        assert [m.path(i).resolve() for i in range(12)] == [true.path(i).resolve() for i in range(12)]
    assert m.image(1).shape == (3, 24, 16), "turned upright"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:datasets")
@pytest.mark.parametrize("kind", ["folder", "table", "coco", "shards", "hub"])
def test_separate_files_share_their_classes(kind: str, true: Manifest, tmp_path: Path):
    rows = torch.arange(12)
    parts = {"train": rows < 4, "val": (rows >= 4) & (rows < 8), "test": rows >= 8}  # each has one class of its own
    where: dict[str, Any] = {}
    for part, mask in parts.items():
        m = true.where(mask)
        if kind == "folder":
            target = tmp_path / f"my {part}" / m.compact().classes[0]
            target.mkdir(parents=True)
            for i in range(len(m)):
                (target / m.path(i).name).write_bytes(m.path(i).read_bytes())
            where[part] = tmp_path / f"my {part}"
        elif kind == "table":
            where[part] = tmp_path / f"{part}.csv"
            write_table(m, where[part])
        elif kind == "coco":
            where[part] = tmp_path / f"{part}.json"
            write_coco(m.compact(), where[part])  # category ids restart at 0 in every file
        elif kind == "shards":
            where[part] = tmp_path / f"my {part}"
            write_shards(m, where[part] / "%d.tar", items=2, seed=None)
        else:
            where[part] = tmp_path / part
            hub_rows(m, inside=True).save_to_disk(where[part])
    read = {"folder": read_folder, "table": read_table, "coco": read_coco, "shards": read_shards, "hub": read_hub}[kind]
    more = {"cache_dir": tmp_path / "cache"} if kind == "hub" else {}
    m = read(where, **more)
    assert m.classes == CLASSES
    assert m.labels().tolist() == true.labels().tolist()
    assert m.column("split") == ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    assert all(torch.equal(m.image(i), true.image(i)) for i in range(12))


# --------------------------------------------------------------------------------------------------------- round trips


def rich(root: Path) -> Manifest:
    """Boxes, gaps, words that need quotes, a column of its own."""
    for i in range(3):
        paint(root / f"{i}.png", i, (40, 30))
    boxes = [[0.1, 0.7, 20.3, 29.9], None, [1 / 3, 2, 40, 30], None, None]
    return Manifest.build(
        {
            "image": ["0.png", "0.png", "1.png", "2.png", "2.png"],
            "label": ["007", "7", "007", "a;b", "7"],
            "text": ['a "quoted", one', None, "two\nlines", "NA", " "],
            "box": boxes,
            "group": ["g1", "g1", "g2", None, "null"],
            "split": ["train", "train", "val", "test", "test"],
            "shop": ["0012", "x|y", None, "true", "2020-01-01"],
        },
        root,
    )


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.json"])
def test_everything_comes_back_exactly(name: str, tmp_path: Path):
    m = rich(tmp_path)
    if name == "t.json":
        write_coco(m, tmp_path / name)
        again = read_coco(tmp_path / name)
    else:
        write_table(m, tmp_path / name)
        again = read_table(tmp_path / name)
    assert again.classes == m.classes == ("007", "7", "a;b")
    assert again.root == m.root
    assert again.ids() == m.ids()
    for column in m.names():
        assert again.column(column) == m.column(column), column
    assert set(again.names()) == set(m.names())
    assert not list(tmp_path.glob(".*part"))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.json"])
def test_a_table_written_elsewhere_leads_to_the_same_files(name: str, tmp_path: Path):
    m = rich(tmp_path / "photos")
    out = tmp_path / "a" / "b" / name
    out.parent.mkdir(parents=True)
    (write_coco if name == "t.json" else write_table)(m, out)
    again = (read_coco if name == "t.json" else read_table)(out)
    assert [again.path(i).resolve() for i in range(5)] == [m.path(i).resolve() for i in range(5)]
    if name != "t.parquet":
        assert str(tmp_path) not in out.read_text(), "no absolute path is written"


def test_a_class_order_of_its_own_survives_in_parquet_only(tmp_path: Path):
    m = rich(tmp_path)
    m = m.with_classes(m.classes[::-1])
    write_table(m, tmp_path / "t.parquet")
    write_table(m, tmp_path / "t.csv")
    assert read_table(tmp_path / "t.parquet").classes == ("a;b", "7", "007")
    assert read_table(tmp_path / "t.csv").classes == ("007", "7", "a;b")


def test_kinds_of_further_columns(tmp_path: Path):
    paint(tmp_path / "a.png", 0)
    m = Manifest.build({"image": ["a.png"], "label": ["x"], "n": [3], "list": [[1, 2]]}, tmp_path)
    write_table(m, tmp_path / "t.jsonl")
    assert read_table(tmp_path / "t.jsonl").column("list") == [[1, 2]]
    with pytest.raises(InputError, match=r"CSV cannot hold these columns .* write .jsonl or .parquet"):
        write_table(m, tmp_path / "t.csv")
    with pytest.raises(InputError, match=r"tables are written as .csv, .tsv, .jsonl or .parquet"):
        write_table(m, tmp_path / "t.xlsx")


def test_images_without_labels(tmp_path: Path):
    paint(tmp_path / "sub" / "a.png", 0)
    m = read_folder(tmp_path, labels=False)
    assert m.classes == ()
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        write_table(m, tmp_path / name)
        again = read_table(tmp_path / name, labels=False)
        assert (again.classes, again.ids()) == ((), ("sub/a.png",))
    with pytest.raises(InputError, match="a COCO file needs labels"):
        write_coco(m, tmp_path / "t.json")


@anytime
@given(st.floats(0, 5000), st.floats(0.01, 5000))
def test_a_box_comes_back_to_the_last_bit(start: float, span: float):
    corners = np.array([[start, start, start + span, start + 2 * span]])
    widths = _spans(corners)
    assert (corners[:, :2] + widths == corners[:, 2:]).all()


# ------------------------------------------------------------------------------------------------------------ folders


def test_nested_folders_are_classes_by_their_path(tmp_path: Path):
    for name in ("fruit/apple/1.png", "fruit/pear/1.png", "veg/1.png", ".hidden/x/1.png", "__MACOSX/a/1.png"):
        paint(tmp_path / name, 0)
    paint(tmp_path / "veg" / "._1.png", 0)
    (tmp_path / "veg" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "veg" / "up").symlink_to(tmp_path, target_is_directory=True)  # would go round for ever
    m = read_folder(tmp_path)
    assert m.classes == ("fruit/apple", "fruit/pear", "veg")
    assert len(m) == 3


def test_top_folders_named_like_parts_are_the_split(tmp_path: Path):
    for name in ("train/a/1.png", "train/b/x/1.png", "valid/a/2.png", "Test/a/3.png"):
        paint(tmp_path / name, 0)
    m = read_folder(tmp_path)
    assert m.classes == ("a", "b/x")
    assert dict(zip(m.column("image"), m.column("split"), strict=True)) == {
        "Test/a/3.png": "test",
        "train/a/1.png": "train",
        "train/b/x/1.png": "train",
        "valid/a/2.png": "val",
    }


def test_a_class_called_test_is_a_class(tmp_path: Path):
    for name in ("test/1.png", "rest/1.png"):
        paint(tmp_path / name, 0)
    assert read_folder(tmp_path).classes == ("rest", "test")
    (tmp_path / "rest" / "1.png").unlink()
    assert read_folder(tmp_path).classes == ("test",)


def test_folders_that_are_half_a_split_are_refused(tmp_path: Path):
    for name in ("train/a/1.png", "test/a/1.png", "extra/a/1.png"):
        paint(tmp_path / name, 0)
    with pytest.raises(InputError, match="test, train look like parts of a split, but extra does not"):
        read_folder(tmp_path)


def test_folders_that_are_none(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no images"):
        read_folder(tmp_path)
    paint(tmp_path / "loose.png", 0)
    with pytest.raises(InputError, match=r"1 images lie outside of any class folder \(first: loose.png\)"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="is a file; read it by read_table"):
        read_folder(tmp_path / "loose.png")
    paint(tmp_path / "train" / "1.png", 0)
    paint(tmp_path / "test" / "a" / "1.png", 0)
    (tmp_path / "loose.png").unlink()
    with pytest.raises(InputError, match=r"1 images lie outside .* train/1.png"):
        read_folder(tmp_path)


# ------------------------------------------------------------------------------------------------------------- tables


def table(folder: Path, content: str, name: str = "t.csv", **settings: Any) -> Manifest:  # noqa: ANN401
    (folder / name).write_text(content, encoding="utf-8")
    return read_table(folder / name, check_files=False, **settings)


def test_columns_go_by_many_names(tmp_path: Path):
    m = table(tmp_path, " Filepath , CATEGORY,Caption,subset,group_id,other\na,1,t,train,g,o\n")
    assert m.names() == ("image", "label", "text", "group", "split", "other")
    assert m.column("group") == ["g"]


def test_the_exact_name_wins(tmp_path: Path):
    m = table(tmp_path, "image,path,label,category\na,b,fine,coarse\n")
    assert (m.column("image"), m.column("label")) == (["a"], ["fine"])
    assert (m.column("path"), m.column("category")) == (["b"], ["coarse"])


def test_columns_are_mapped_by_the_user(tmp_path: Path):
    content = "foto,label,category,who\na,fine,coarse,me\n"
    m = table(tmp_path, content, columns={"image": "foto", "label": "category", "group": "who"})
    assert (m.column("image"), m.column("label"), m.column("group")) == (["a"], ["coarse"], ["me"])
    assert m.column("original_label") == ["fine"], "what lost its name is kept"
    m = table(tmp_path, content, columns={"image": "foto", "text": "label"})
    assert (m.column("label"), m.column("text")) == (["coarse"], ["fine"])


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("", {}, r"t.csv is empty"),
        ("image,label\n", {}, r"t.csv has no rows"),
        ("image,species\na,b\n", {}, r"has no label column. It has image, species; .* columns={'label': 'species'}"),
        ("bild,label\na,b\n", {}, r"has no image column. It has bild, label; .*columns={'image': 'bild'}"),
        (
            "image,class,category\na,b,c\n",
            {},
            r"has class and category, each of which may be the label: choose one, col",
        ),
        ("a/1.png,cat\na/2.png,dog\n", {}, r"begins with data, not with names: add a first line"),
        ("image,label,label\na,b,c\n", {}, r"two columns are called 'label'"),
        ("image,label\na,b\nc,d,e\n", {}, r"line 3 has 3 fields, the header has 2. A value that holds ','"),
        ("image,label\na,b\nc,\n", {}, r"no label in row 2"),
        ("image,label\na,b\n,d\n", {}, r"no image in row 2"),
        ("image,label\na,b\n", {"columns": {"lable": "label"}}, r"columns: 'lable' is none of .* did you mean label"),
        ("image,label\na,b\n", {"columns": {"hue": "label"}}, r"columns: 'hue' is none .*; there are image, label"),
        (
            "image,label\na,b\n",
            {"columns": {"group": "shop"}},
            r"no column 'shop' \(columns.group\); it has image, lab",
        ),
        ("image,label,bbox\na,b,1 2 3 4\n", {}, r"column 'bbox' may be x0, y0, x1, y1 or x, y, width, height. Say"),
        ("image,label,box\na,b,1 2 3\n", {}, r"row 1 has the box '1 2 3'; give four numbers"),
        ("image,label,box\na,b,\nc,d,1 2 x 4\n", {}, r"row 2 has the box '1 2 x 4'"),
        ("image,label,x0,y0,x1,y1\na,b,1,2,3,\n", {}, r"row 1 has only a part of a box"),
        ("image,label,x0,y0,x1,y1\na,b,1,2,3,four\n", {}, r"column 'y1' should hold numbers"),
        (
            "image,label,x0,y0,x1,y1,x,y,w,h\na,b,1,2,3,4,1,2,2,2\n",
            {},
            r"may hold boxes in x0,y0,x1,y1 or x,y,w,h: choo",
        ),
        ("image,label,x,y\na,b,1,2\n", {"columns": {"box": "x,y"}}, r"a box is one column or four, not 2"),
        ("image,label,x\na,b,1\n", {"columns": {"box": "x", "box_xywh": "x"}}, r"give box or box_xywh, not both"),
        ("image,label,box\na,b,5 2 3 4\n", {}, r"x0 < x1 and y0 < y1; row 1"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(content: str, settings: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        table(tmp_path, content, **settings)


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("image,label,box\na,x,'1,2,3.5,4'\nb,x,\n", {}),
        ("image,label,box\na,x,[1 2 3.5 4]\nb,x,\n", {}),
        ("image,label,bbox\na,x,'(1; 2; 3.5; 4.0)'\nb,x,\n", {"box": "bbox"}),
        ("image,label,bbox\na,x,'1,2,2.5,2'\nb,x,\n", {"box_xywh": "bbox"}),
        ("image,label,xmin,ymin,xmax,ymax\na,x,1,2,3.5,4\nb,x,,,,\n", {}),
        ("image,label,X,Y,Width,Height\na,x,1,2,2.5,2\nb,x,,,,\n", {}),
        ("image,label,a,b,c,d\na,x,1,2,3.5,4\nb,x,,,,\n", {"box": "a, b,c,d"}),
        ("image,label,a,b,c,d\na,x,1,2,2.5,2\nb,x,,,,\n", {"box_xywh": "a,b,c,d"}),
        ("image,label,x1,y1,x2,y2\na,x,1,2,3.5,4\nb,x,,,,\n", {}),
    ],
)
def test_boxes_in_every_dress(content: str, columns: dict[str, str], tmp_path: Path):
    m = table(tmp_path, content.replace("'", '"'), columns=columns)
    assert m.column("box") == [[1, 2, 3.5, 4], None]
    assert m.names() == ("image", "label", "box")
    whole = table(tmp_path, content.replace("'", '"'), columns={"box": ""})
    assert "box" not in whole.names() or whole.column("box")[0] is None or m.names() == whole.names()


def test_no_box_where_none_is_wanted(tmp_path: Path):
    assert "box" not in table(tmp_path, "image,label,bbox\na,x,1 2 3 4\n", columns={"box": ""}).names()


def test_width_and_height_alone_are_no_box(tmp_path: Path):
    assert table(tmp_path, "image,label,width,height\na,x,10,20\n").column("width") == ["10"]


def test_what_a_csv_holds_stays_as_it_is_written(tmp_path: Path):
    m = table(tmp_path, "image,label,note\na,NA,001\nb,None,null\nc,nan,\n")
    assert m.column("label") == ["NA", "None", "nan"]
    assert m.column("note") == ["001", "null", None]


def test_the_separator_is_not_fooled(tmp_path: Path):
    assert table(tmp_path, "image,label,keys\na,x,p|q|r\nb,y,s|t\n").column("keys") == ["p|q|r", "s|t"]
    assert table(tmp_path, "image;label;text\na;x;one, two, three\nb;y;four, five\n").column("text")[1] == "four, five"
    assert table(tmp_path, ",image,label\n0,a,x\n1,b,y\n").names() == ("image", "label"), "a nameless index is dropped"
    assert table(tmp_path, 'image\tlabel\ttext\na\tx\t"a\nb"\n').column("text") == ["a\nb"]


def test_files_that_are_no_table(tmp_path: Path):
    (tmp_path / "photos.csv").write_text("image,label\n")
    with pytest.raises(InputError, match=r"photo.csv does not exist; did you mean photos.csv\?"):
        read_table(tmp_path / "photo.csv")
    with pytest.raises(InputError, match="folder without Parquet files; folders of images are read by read_folder"):
        read_table(tmp_path)
    (tmp_path / "latin.csv").write_bytes("image,label\na.png,café\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.csv: it is not in UTF-8 .* save it as UTF-8"):
        read_table(tmp_path / "latin.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match=r"broken.parquet cannot be read"):
        read_table(tmp_path / "broken.parquet")
    (tmp_path / "sheet.xlsx").touch()
    with pytest.raises(InputError, match="a spreadsheet; save it as CSV"):
        read_table(tmp_path / "sheet.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"image": "a", "label": "x"}\n{"image": "b"\n', "line 2 is not JSON"),
        ("t.jsonl", "image,label\n", "line 1 is not JSON"),
        ("t.jsonl", '["a", "x"]\n', "line 1 holds a list"),
        (
            "t.jsonl",
            '{"image": "a", "label": "x"}\n{"image": "b", "label": 7}\n',
            "line 2 has label = 7, the first line",
        ),
        ("t.json", '{"images": [], "annotations": []}', "is a COCO file; it is read by read_coco"),
        ("t.json", '{"image": "a"}', "should hold a list of objects"),
        ("t.json", '{"image": "a"}\n{"image": "b"}', "a file with one object a line is called .jsonl"),
    ],
)
def test_what_is_wrong_with_json_is_said(name: str, content: str, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        table(tmp_path, content, name)


def test_json_lines_keep_kinds(tmp_path: Path):
    content = '{"image": "a", "label": 3, "when": "2020-01-01", "box": [0, 1, 2, 3]}\n{"image": "b", "label": 10}\n'
    m = table(tmp_path, content, "t.jsonl")
    assert m.classes == ("3", "10")
    assert m.column("when") == ["2020-01-01", None]
    assert m.column("box") == [[0, 1, 2, 3], None]


def test_missing_images_are_named_before_anything_else(tmp_path: Path):
    paint(tmp_path / "a.png", 0)
    (tmp_path / "t.csv").write_text("image,label\na.png,x\nb.png,x\nc.png,y\n")
    with pytest.raises(
        InputError, match=r"t.csv: 2 of 3 image files are missing below .* \(row 2: b.png; row 3: c.png\)"
    ):
        read_table(tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv", check_files=False).missing().tolist() == [False, True, True]


# --------------------------------------------------------------------------------------------------------------- COCO


def coco(folder: Path, **changes: Any) -> Path:  # noqa: ANN401
    content: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}, {"id": 3, "file_name": "b.png"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10, 5, 20, 10]},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 40, 30]},
            {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 4, 3], "iscrowd": 1},
            {"id": 4, "image_id": 3, "category_id": 5},
        ],
        "categories": [{"id": 90, "name": "pear"}, {"id": 5, "name": "apple"}, {"id": 1, "name": "never"}],
    }
    for key, value in changes.items():
        where, _, field = key.partition("__")
        if not field:
            content[where] = value
        elif value is None:
            del content[where][0][field]
        else:
            content[where][0][field] = value
    for name in ("a.png", "b.png"):
        paint(folder / name, len(name), (40, 30))
    path = folder / "c.json"
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def test_coco_boxes_are_corner_and_size(tmp_path: Path):
    m = read_coco(coco(tmp_path))
    assert m.classes == ("apple", "pear"), "a category without an annotation is no class"
    assert m.column("label") == ["pear", "apple", "apple"], "ids are arbitrary, a crowd is left out"
    assert m.column("box") == [[10, 5, 30, 15], None, None], "the whole picture is no box"
    assert m.image(0).shape == (3, 10, 20)
    assert m.ids() == ("a.png#10,5,30,15", "a.png", "b.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, "c.json lacks categories: a COCO file has images, annotations, categories; this has im"),
        ({"annotations": []}, "has no annotations"),
        ({"images__file_name": None}, "image 7 has no 'file_name'; it has id"),
        ({"images__id": None}, "image 0 has no 'id'"),
        ({"annotations__category_id": None}, "annotation 1 has no 'category_id'"),
        ({"annotations__image_id": None}, "annotation 1 has no 'image_id'"),
        ({"annotations__category_id": 8}, "annotation 1 has category_id 8, which the file does not define"),
        ({"annotations__image_id": 8}, "annotation 1 has image_id 8, which the file does not define"),
        ({"annotations__bbox": [1, 2, 0, 3]}, r"annotation 1 has a bbox without area, \[1, 2, 0, 3\]"),
        ({"annotations__bbox": [1, 2, 3]}, "annotation 1 has bbox .* give x, y, width, height"),
        ({"annotations__bbox": [30, 5, 20, 10]}, r"annotation 1 .* outside its image a.png of 40 x 30 pixels"),
        ({"categories__name": "apple"}, "categories 90 and 5 are both called 'apple'; rename one"),
        ({"categories__name": None}, "category 90 has no 'name'"),
    ],
)
def test_what_is_wrong_with_a_coco_file_is_said(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        read_coco(coco(tmp_path, **changes))


def test_coco_files_that_are_none(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_coco(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(InputError, match=r"half.json is not JSON \(.*line 1"):
        read_coco(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match=r"lacks images, annotations, categories.*this has a list"):
        read_coco(tmp_path / "list.json")
    with pytest.raises(InputError, match="a mapping needs `path` to be one too"):
        read_coco(tmp_path / "list.json", images={"train": tmp_path})


def test_a_box_may_be_rounded_over_the_edge(tmp_path: Path):
    assert read_coco(coco(tmp_path, annotations__bbox=[20, 5, 20.9, 10])).column("box")[0] == [20, 5, 40.9, 15]


def test_coco_images_are_looked_for_nearby(tmp_path: Path):
    path = coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    moved = path.rename(tmp_path / "annotations" / "train.json")
    assert read_coco(moved).root == tmp_path
    for name in ("a.png", "b.png"):
        (tmp_path / name).rename(tmp_path / "images" / name)
    assert read_coco(moved).root == tmp_path / "images"
    with pytest.raises(InputError, match=r"3 of 3 image files are missing .* images="):
        read_coco(moved, images=tmp_path)
    assert len(read_coco(moved, images=tmp_path, check_files=False)) == 3


def test_coco_sizes_are_those_of_the_upright_picture(tmp_path: Path):
    paint(tmp_path / "a.jpg", 0, (24, 16), orientation=6)
    write_coco(Manifest.build({"image": ["a.jpg"], "label": ["x"]}, tmp_path), tmp_path / "c.json")
    image = json.loads((tmp_path / "c.json").read_text())["images"][0]
    assert (image["width"], image["height"]) == (16, 24)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"a.jpg"):
        write_coco(Manifest.build({"image": ["a.jpg"], "label": ["x"]}, tmp_path), tmp_path / "c.json")


def test_attributes_of_mixed_kinds_become_words(tmp_path: Path):
    path = coco(tmp_path)
    content = json.loads(path.read_text())
    for annotation, value in zip(content["annotations"], (1, "two", 9, None), strict=True):
        annotation["attributes"] = {"note": value}
    path.write_text(json.dumps(content))
    assert read_coco(path).column("note") == ["1", "two", None]


# ---------------------------------------------------------------------------------------------------------------- Hub


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:datasets")
def test_hub_splits(true: Manifest, tmp_path: Path):
    import datasets

    rows = hub_rows(true, inside=True)
    parts = {"train": rows.select(range(6)), "validation": rows.select(range(6, 9)), "extra": rows.select(range(9, 12))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    m = read_hub(tmp_path / "all", cache_dir=tmp_path / "cache")
    assert m.column("split") == ["train"] * 6 + ["val"] * 3 + ["extra"] * 3
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.*")}
    assert len(before) == 12
    one = read_hub(tmp_path / "all", split="validation", cache_dir=tmp_path / "cache")
    assert "split" not in one.names()
    assert torch.equal(one.image(0), true.image(6))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.*")} == before, "nothing is written twice"
    assert {p.suffix for p in before} == {".jpg", ".png"}
    own = read_hub({"train": tmp_path / "all", "val": tmp_path / "all"}, cache_dir=tmp_path / "cache")
    assert own.column("split") == ["train"] * 6 + ["val"] * 3
    with pytest.raises(InputError, match="no split 'test'; it has train, validation, extra"):
        read_hub(tmp_path / "all", split="test", cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="test: the data set has the splits train, validation, extra"):
        read_hub({"test": tmp_path / "all"}, cache_dir=tmp_path / "cache")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:datasets")
def test_hub_columns(true: Manifest, tmp_path: Path):
    rows = hub_rows(true, inside=True).rename_columns({"image": "front", "label": "kind"})
    rows = rows.add_column("who", [f"p{i}" for i in range(12)])
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(
        InputError,
        match=r"has no label column. It has .*; say which one it is, for example columns={'label': '(kind|who)'}",
    ):
        read_hub(tmp_path / "one", cache_dir=tmp_path / "cache")
    m = read_hub(tmp_path / "one", columns={"label": "kind", "group": "who"}, cache_dir=tmp_path / "cache")
    assert m.column("group") == [f"p{i}" for i in range(12)]
    assert m.column("label") == true.column("label")
    rows.cast_column("front", rows.features["front"]).map(lambda row: {"back": row["front"]}).save_to_disk(
        tmp_path / "two"
    )
    with pytest.raises(
        InputError, match=r"has 2 columns of pictures; choose by columns={'image': …} among .*front \(Im"
    ):
        read_hub(tmp_path / "two", columns={"label": "kind"}, cache_dir=tmp_path / "cache")
    assert (
        len(read_hub(tmp_path / "two", columns={"label": "kind", "image": "back"}, cache_dir=tmp_path / "cache")) == 12
    )
    with pytest.raises(InputError, match="has no column 'side'"):
        read_hub(tmp_path / "two", columns={"label": "kind", "image": "side"}, cache_dir=tmp_path / "cache")


def test_hub_without_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"need `datasets`: pip install 'vicinal\[hub\]'"):
        read_hub("owner/name", cache_dir=tmp_path)


def test_hub_data_that_cannot_be_had(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"the data set .*empty cannot be had \(.*save_to_disk"):
        read_hub(tmp_path / "empty", cache_dir=tmp_path)


# ------------------------------------------------------------------------------------------------------------ prepare


@pytest.fixture
def divided(tmp_path: Path) -> Manifest:
    """Ten classes of three pictures, one in each part; the order of the classes is not the sorted one."""
    images, labels, split = [], [], []
    for c in range(10):
        for i, part in enumerate(("train", "valid", "test")):
            images.append(f"{part}/{c}.png")
            labels.append(f"class {9 - c}")
            split.append(part)
            paint(tmp_path / "photos" / images[-1], 3 * c + i)
    names = [f"class {9 - c}" for c in range(10)]
    return Manifest.build({"image": images, "label": labels, "split": split}, tmp_path / "photos", classes=names)


@pytest.mark.parametrize("format", ["coco", "parquet"])
def test_prepare_writes_what_is_seen_and_what_is_not(format: str, divided: Manifest, tmp_path: Path):
    paths = prepare(divided, tmp_path / "out", holdout=0.3, seed=7, format=format)
    read = read_coco if format == "coco" else read_table
    suffix = "json" if format == "coco" else "parquet"
    names = [f"{side}{part}.{suffix}" for part in ("train", "val", "test") for side in ("", "public_", "holdout_")]
    assert [path.name for path in paths] == names
    assert {p.name for p in (tmp_path / "out" / "annotations").iterdir()} == {*names, "split.json"}
    seen, unseen = class_disjoint(divided.classes, holdout=0.3, seed=7)
    for path in paths:
        m = read(path)
        expected = unseen if "holdout" in path.name else seen if "public" in path.name else divided.classes
        assert set(m.classes) == set(expected), "only the classes that there are"
        assert len(m) == len(expected)
        assert not m.missing().any()
        if format == "coco":
            content = json.loads(path.read_text())
            assert {c["name"]: c["id"] for c in content["categories"]} == {
                c: divided.classes.index(c) for c in expected
            }
            assert all(not Path(image["file_name"]).is_absolute() for image in content["images"])
            assert all(a["bbox"] == [0, 0, 24, 16] and a["area"] == 384 for a in content["annotations"])
    note = json.loads((tmp_path / "out" / "annotations" / "split.json").read_text())
    assert (note["seed"], note["holdout"], note["holdout_classes"]) == (7, 0.3, list(unseen))
    assert note["files"]["train." + suffix] == 10
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["annotations"], "no image is copied"


def test_prepare_never_mixes_two_seeds(divided: Manifest, tmp_path: Path):
    first = prepare(divided, tmp_path / "out", holdout=0.3, seed=1)
    prepare(divided.where([w != "test" for w in divided.column("split")]), tmp_path / "out", holdout=0.3, seed=2)
    names = {p.name for p in (tmp_path / "out" / "annotations").iterdir()}
    assert not any("test" in name for name in names)
    assert set(read_coco(first[2]).classes) == set(class_disjoint(divided.classes, holdout=0.3, seed=2)[1])
    prepare(divided, tmp_path / "out", holdout=0.3, seed=2, format="parquet")
    assert {p.suffix for p in (tmp_path / "out" / "annotations").iterdir() if p.name != "split.json"} == {".parquet"}


def test_prepare_leaves_the_files_of_others_alone(divided: Manifest, tmp_path: Path):
    folder = tmp_path / "out" / "annotations"
    folder.mkdir(parents=True)
    (folder / "instances.json").write_text("{}")
    (folder / "public_train.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds public_train.json, of which no split.json tells the seed"):
        prepare(divided, tmp_path / "out", holdout=0.3, seed=1)
    (folder / "public_train.json").unlink()
    (folder / "split.json").write_text("[]")
    with pytest.raises(InputError, match=r"split.json is not by vicinal"):
        prepare(divided, tmp_path / "out", holdout=0.3, seed=1)
    (folder / "split.json").unlink()
    prepare(divided, tmp_path / "out", holdout=0.3, seed=1)
    assert (folder / "instances.json").read_text() == "{}"


def test_prepare_without_parts(divided: Manifest, tmp_path: Path):
    table = divided.table.drop_columns(["split"])
    m = Manifest.build(table, divided.root)
    paths = prepare(m, tmp_path / "out", holdout=0.2, seed=0)
    assert [path.name for path in paths] == ["all.json", "public_all.json", "holdout_all.json"]
    assert [len(read_coco(path)) for path in paths] == [30, 24, 6]


def test_prepare_refuses_leaks_and_unknown_formats(divided: Manifest, tmp_path: Path):
    with pytest.raises(InputError, match="'yolo' is unknown; use coco or parquet"):
        prepare(divided, tmp_path / "out", holdout=0.2, seed=0, format="yolo")
    images = divided.column("image")
    leaky = divided.table.set_column(0, "image", pa.array([images[1], *images[1:]]))
    with pytest.raises(InputError, match=r"1 image file is in more than one part .* valid/0.png is in train"):
        prepare(Manifest.build(leaky, divided.root), tmp_path / "out", holdout=0.2, seed=0)
    assert not (tmp_path / "out").exists(), "nothing is written before all is known to be right"


def test_the_real_tables_are_read(real_data: Path):
    tables = sorted(real_data.glob("*/table.csv"))
    assert len(tables) >= 6
    sizes = {p.parent.name: (len(m), len(m.classes)) for p in tables for m in [read_table(p)]}
    assert sizes["grocery"] == (5421, 81)
    assert sizes["emoji"] == (3778, 1446)
