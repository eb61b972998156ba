"""The Manifest: its types, its mistakes by name, its ids, and that it survives being cut, joined, saved and moved."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vicinal.data.manifest import Manifest, box_array, box_values, row_list, split_word
from vicinal.types import InputError

anytime = settings(deadline=None, max_examples=60)  # nothing is timed here


def manifest(**columns: object) -> Manifest:
    return Manifest.build({"image": ["a.png", "b.png", "c.png"], "label": ["x", "y", "x"], **columns}, "photos")


# ---------------------------------------------------------------------------------------------------------- labels


def test_labels_are_positions_in_the_sorted_classes():
    m = manifest(label=["pear", "apple", "pear"])
    assert m.classes == ("apple", "pear")
    assert m.labels().tolist() == [1, 0, 1]
    assert m.labels().dtype == torch.int64


@pytest.mark.parametrize(
    "labels", [[10, 9, 100], ["10", "9", "100"], [10.0, 9.0, 100.0], pa.array([10, 9, 100], pa.int8())]
)
def test_integers_sort_as_integers(labels: object):
    m = manifest(label=labels)
    assert m.classes == ("9", "10", "100")
    assert m.labels().tolist() == [1, 0, 2]


def test_words_that_look_like_numbers_stay_words():
    assert manifest(label=["007", "7", "x"]).classes == ("007", "7", "x")
    assert manifest(label=["-1", "0", "-2"]).classes == ("-2", "-1", "0")
    assert manifest(label=[1.5, 0.5, 1.5]).classes == ("0.5", "1.5")


def test_dictionary_columns_are_read():
    m = manifest(label=pa.array(["x", "y", "x"]).dictionary_encode())
    assert m.labels().tolist() == [0, 1, 0]
    assert m.table["label"].type == pa.string()


def test_blanks_around_words_are_no_part_of_them():
    m = manifest(label=[" x", "x ", "x"], text=[" kept ", None, ""])
    assert m.classes == ("x",)
    assert m.column("text") == [" kept ", None, None]


@anytime
@given(st.lists(st.text(min_size=1).map(str.strip).filter(bool), min_size=1, max_size=40))
def test_labels_lead_back_to_their_names(names: list[str]):
    m = Manifest.build({"image": [f"{i}.png" for i in range(len(names))], "label": names}, ".")
    assert [m.classes[i] for i in m.labels().tolist()] == m.column("label")
    assert len(set(m.classes)) == len(m.classes)


def test_given_classes_keep_their_order_and_may_be_more():
    m = Manifest.build({"image": ["a"], "label": ["x"]}, ".", classes=["z", "x", "a"])
    assert m.classes == ("z", "x", "a")
    assert m.labels().tolist() == [1]
    assert m.compact().classes == ("x",)
    assert m.with_classes(["x", "z"]).labels().tolist() == [0]


def test_unlabelled_rows_have_no_classes():
    m = Manifest.build({"image": ["a", "b"]}, ".")
    assert m.classes == ()
    assert m.labels().tolist() == [0, 0]
    assert m.column("label") == [None, None]


# --------------------------------------------------------------------------------------------- mistakes, by their name


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a"], "label": ["x"]}, "cars.csv has no column 'image'; it has path, label"),
        ({"image": []}, "cars.csv has no rows"),
        ({"image": ["a", "", None], "label": ["x"] * 3}, "cars.csv: no image in rows 2, 3"),
        ({"image": ["a", "b", "c"], "label": ["x", None, ""]}, "cars.csv: no label in rows 2, 3; give one"),
        ({"image": ["a", "b"], "label": [1.0, float("nan")]}, "cars.csv: no label in row 2"),
        ({"image": [{"bytes": b""}], "label": ["x"]}, "column 'image' holds struct.* read_hub"),
        ({"image": [b"raw"], "label": ["x"]}, "column 'image' holds binary"),
        ({"image": ["a"], "label": [["x"]]}, "column 'label' holds list"),
        ({"image": ["a"], "label": ["x"], "box": [[1, 2, 3]]}, "a box is four numbers"),
        ({"image": ["a"], "label": ["x"], "box": ["1,2,3,4"]}, "a box is four numbers"),
        (
            {"image": ["a", "b"], "label": ["x", "x"], "box": [[0, 0, 1, 1], [5, 0, 5, 9]]},
            r"x0 < x1 and y0 < y1; row 2: \[5",
        ),
        ({"image": ["a"], "label": ["x"], "box": [[0, 0, float("inf"), 9]]}, "row 1"),
    ],
)
def test_mistakes_are_named_with_file_and_row(columns: dict[str, list[object]], message: str):
    with pytest.raises(InputError, match=message):
        Manifest.build(columns, ".", name="cars.csv")


def test_a_label_that_is_no_class_is_named():
    with pytest.raises(InputError, match="'x', 'y' are not among the 1 classes given"):
        manifest().with_classes(["z"])
    many = Manifest.build({"image": [str(i) for i in range(9)], "label": list(range(9))}, ".")
    with pytest.raises(InputError, match=r"'0', '1', '2', '3', '4' and 4 more are not"):
        many.with_classes(["z"])
    with pytest.raises(InputError, match="has no labels, but is to have 1 classes"):
        Manifest.build({"image": ["a"]}, ".").with_classes(["z"])


def test_rows_are_counted_from_one_and_the_many_are_counted():
    assert row_list(np.array([0])) == "row 1"
    assert row_list(np.arange(1000)) == "rows 1, 2, 3, 4, 5 and 995 more"


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(InputError, match="no column 'kind'; the table has image, label"):
        manifest().column("kind")


# ------------------------------------------------------------------------------------------------------------ ids


def test_ids_are_unique_and_stay_with_their_rows():
    box = [0, 0, 10, 10]
    m = Manifest.build(
        {
            "image": ["a", "a", "a", "a", "b", "b"],
            "label": ["x"] * 6,
            "box": [box, [0, 0, 0.1, 1e6], box, None, None, None],
        },
        ".",
    )
    assert m.ids() == ("a#0,0,10,10", "a#0,0,0.1,1000000", "a#0,0,10,10#2", "a", "b", "b#2")
    mask = np.array([False, False, True, False, False, True])
    assert m.where(mask).ids() == ("a#0,0,10,10#2", "b#2")
    assert m.where(mask).with_classes(["x", "y"]).ids() == ("a#0,0,10,10#2", "b#2")


@anytime
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, 1, 2, 3])), min_size=1, max_size=30), st.data()
)
def test_ids_are_unique_whatever_repeats(rows: list[tuple[str, int | None]], data: st.DataObject):
    boxes = [None if n is None else [0, 0, n, n] for _, n in rows]
    m = Manifest.build({"image": [name for name, _ in rows], "label": ["x"] * len(rows), "box": boxes}, ".")
    ids = m.ids()
    assert len(set(ids)) == len(rows)
    mask = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    if any(mask):
        assert m.where(mask).ids() == tuple(name for name, keep in zip(ids, mask, strict=True) if keep)
    assert len(set(m.concat(m).ids())) == 2 * len(rows)


def test_a_users_column_called_copy_is_the_users():
    m = manifest(image=["a", "a", "b"], copy=["first", "second", "third"])
    assert m.column("copy") == ["first", "second", "third"]
    assert m.ids() == ("a", "a#2", "b")


# -------------------------------------------------------------------------------------------------- cut and join


def test_where_takes_tensors_arrays_and_lists():
    m = manifest(score=[1, 2, 3])
    for mask in ([True, False, True], np.array([True, False, True]), torch.tensor([True, False, True])):
        kept = m.where(mask)
        assert kept.ids() == ("a.png", "c.png")
        assert kept.column("score") == [1, 3]
        assert kept.classes == m.classes
    assert len(m.where([False] * 3)) == 0


@pytest.mark.parametrize("mask", [[True], np.array([0, 2, 1]), torch.ones(4, dtype=torch.bool)])
def test_where_refuses_what_is_no_mask(mask: object):
    with pytest.raises(ValueError, match="where takes 3 truth values"):
        manifest().where(mask)  # type: ignore[arg-type]


def test_a_part_without_rows_answers_all_the_same():
    none = manifest(image=["a", "a", "b"], box=[None, [0, 0, 1, 1], None]).where([False] * 3)
    assert none.labels().shape == (0,)
    assert none.ids() == ()
    assert none.missing().shape == (0,)
    assert none.compact().classes == ()
    assert box_array(none.table).shape == (0, 4)
    assert none.rebased("elsewhere").column("image") == []


def test_concat_wants_one_root_and_one_set_of_classes():
    m = manifest()
    assert len(m.concat(m, m)) == 9
    with pytest.raises(ValueError, match="same root, classes and padding"):
        m.concat(m.with_classes(["x", "y", "z"]))


def test_concat_fills_a_column_that_only_one_has():
    assert manifest().concat(manifest(text=["one", "two", "three"])).column("text") == [None] * 3 + [
        "one",
        "two",
        "three",
    ]


def test_united_counts_labels_over_all_parts_together(tmp_path: Path):
    train = Manifest.build({"image": ["1.png"], "label": ["b"]}, tmp_path / "in" / "a")
    test = Manifest.build({"image": ["1.png"], "label": ["a"], "split": ["whatever"]}, tmp_path / "in" / "b")
    m = Manifest.united({"train": train, "Testing": test})
    assert m.classes == ("a", "b")
    assert m.labels().tolist() == [1, 0]
    assert m.column("split") == ["train", "test"]
    assert m.ids() == ("a/1.png", "b/1.png")
    assert m.path(1) == Path(tmp_path).resolve() / "in" / "b" / "1.png"


def test_united_names_what_is_no_part():
    with pytest.raises(InputError, match="'holdout' is no part of a split; name the sources train, val, test"):
        Manifest.united({"holdout": manifest()})
    with pytest.raises(InputError, match="no source"):
        Manifest.united({})
    with pytest.raises(InputError, match="columns of different kinds"):
        Manifest.united({"train": manifest(score=[1, 2, 3]), "test": manifest(score=[[1], [2], [3]])})


def test_padding_is_a_share():
    assert manifest().with_padding(0.1).padding == 0.1
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="padding is a share"):
            manifest().with_padding(wrong)


def test_split_word():
    assert [split_word(w) for w in ("dev", "TESTING", "tests", "")] == ["val", "test", None, None]


# --------------------------------------------------------------------------------------------------- save and load


def test_saved_and_loaded_and_moved(tmp_path: Path):
    (tmp_path / "one" / "photos").mkdir(parents=True)
    m = Manifest.build(
        {"image": ["é.png", "b.png"], "label": ["y", "x"], "box": [None, [0.1, 0.2, 3, 4]], "score": [[1], [2, 3]]},
        tmp_path / "one" / "photos",
        classes=["y", "z", "x"],
        padding=0.25,
    )
    m.save(tmp_path / "one" / "m.parquet")
    again = Manifest.load(tmp_path / "one" / "m.parquet")
    assert again.table.equals(m.table)
    assert (again.classes, again.padding, again.root) == (("y", "z", "x"), 0.25, m.root.resolve())
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert Manifest.load(tmp_path / "two" / "m.parquet").root == (tmp_path / "two" / "photos").resolve()
    assert not list(tmp_path.rglob("*.part")), "nothing half written is left"


def test_a_saved_part_keeps_its_ids(tmp_path: Path):
    part = manifest(image=["a", "a", "b"]).where([False, True, True])
    part.save(tmp_path / "m.parquet")
    assert Manifest.load(tmp_path / "m.parquet").ids() == ("a#2", "b")


def test_what_is_no_manifest_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="not a manifest saved by vicinal"):
        Manifest.load(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("image,label")
    with pytest.raises(InputError, match="not a manifest saved by vicinal"):
        Manifest.load(tmp_path / "text.parquet")


def test_it_travels_to_other_processes():
    m = manifest(box=[[0, 0, 1, 1], None, None])
    assert pickle.loads(pickle.dumps(m)) == m


def test_boxes_as_numbers_and_back():
    m = manifest(box=[[0, 1, 2, 3], None, [4, 5, 6, 7.5]])
    corners = box_array(m.table)
    assert np.isnan(corners[1]).all()
    assert corners[2].tolist() == [4, 5, 6, 7.5]
    assert box_values(corners).to_pylist() == m.column("box")
    part = m.where([False, True, True])  # a cut column lies at an offset in the same memory
    assert box_array(part.table)[1].tolist() == [4, 5, 6, 7.5]


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("rows", [10, 3000])  # both ways of looking: file by file, and folder by folder
def test_missing_files_are_found(tmp_path: Path, rows: int):
    names = [f"{i % 3}/{i}.png" for i in range(rows)]
    for name in names[::2]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone").mkdir()
    names += ["gone/a.png", "never/b.png", str(tmp_path / names[0]), f"1/../{names[0]}"]
    m = Manifest.build({"image": names}, tmp_path)
    expected = [i % 2 == 1 for i in range(rows)] + [True, True, False, False]
    assert m.missing().tolist() == expected
    with pytest.raises(
        InputError, match=rf"t: {rows // 2 + 2:,} of {rows + 4:,} image files are missing below .* \(row 2: 1/1"
    ):
        m.refuse_missing("t")
    m.where(~m.missing()).refuse_missing("t")


def test_missing_files_are_looked_for_nearby(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    with pytest.raises(InputError, match=r"the first is in .*images: give root='.*images'"):
        Manifest.build({"image": ["a.png"]}, tmp_path).refuse_missing()
    with pytest.raises(InputError, match=r"give the folder that they start from as images"):
        Manifest.build({"image": ["b.png"]}, tmp_path).refuse_missing(hint="images")
    with pytest.raises(InputError, match="write paths with / instead of"):
        Manifest.build({"image": ["images\\a.png"]}, tmp_path).refuse_missing()
    with pytest.raises(InputError, match="these are addresses: fetch the images first"):
        Manifest.build({"image": ["https://example.org/a.png"]}, tmp_path).refuse_missing()


def test_pictures_are_cut_to_their_box(tmp_path: Path):
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    m = Manifest.build({"image": ["a.png"] * 2, "label": ["x"] * 2, "box": [[5, 2, 15, 10], None]}, tmp_path)
    assert torch.equal(m.image(0), torch.from_numpy(pixels[2:10, 5:15]).permute(2, 0, 1))
    assert m.image(1).shape == (3, 20, 30)
    assert m.with_padding(0.1).image(0).shape == (3, 10, 12)
    assert m.with_padding(0.1).image(1).shape == (3, 20, 30)


def test_rebased_paths_lead_to_the_same_files(tmp_path: Path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.png").touch()
    m = Manifest.build({"image": ["a.png", str(tmp_path / "a.png")]}, tmp_path)
    moved = m.rebased(tmp_path / "deep" / "er")
    assert moved.column("image") == ["../../a.png", str(tmp_path / "a.png")]
    assert not moved.missing().any()
    assert moved.rebased(tmp_path).path(0).samefile(tmp_path / "a.png")
