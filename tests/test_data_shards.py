"""Shards: patterns, what makes an item, indices, round trips, and what is lost from a damaged tar."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pictures import draw, write_folder
from vicinal.bring import bring, bring_path
from vicinal.data import shards as room
from vicinal.data.check import check
from vicinal.data.images import Member, decode, image_size, read_bytes
from vicinal.data.loader import eval_batches, train_batches
from vicinal.data.manifest import Manifest
from vicinal.data.samplers import ShuffleSampler
from vicinal.data.shards import expand, image_kind, read_shards, said, split_key, write_shards
from vicinal.data.sources import prepare, read_folder, read_table, read_voc, write_coco, write_table, write_voc
from vicinal.data.transforms import eval_transform, train_transform
from vicinal.recipe import Recipe
from vicinal.types import InputError, Preprocess

SMALL = Preprocess(size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def jpeg(seed: int = 0) -> bytes:
    file = io.BytesIO()
    draw("ellipse", (200, 40, 40), seed).save(file, "JPEG")
    return file.getvalue()


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar of these files, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def plain(count: int, start: int = 0) -> dict[str, bytes]:
    """Items of an image and a caption."""
    files = {}
    for i in range(start, start + count):
        files |= {f"{i:04d}.jpg": jpeg(i), f"{i:04d}.txt": f"picture {i}".encode()}
    return files


# ------------------------------------------------------------------------------------------------------------ patterns


def test_patterns_keep_zeros_and_order(tmp_path: Path) -> None:
    for n in (8, 9, 10):
        pack(tmp_path / f"clip_{n:06d}.tar", plain(1))
    named = [str(tmp_path / f"clip_{n:06d}.tar") for n in (8, 9, 10)]
    assert expand(f"{tmp_path}/clip_{{000008..000010}}.tar") == named
    assert expand(f"{tmp_path}/clip_*.tar") == expand(tmp_path) == expand(named) == named
    assert expand(f"{named[1]}::{named[0]}") == [named[1], named[0]]
    assert expand([named[0], f"{tmp_path}/*.tar"]) == named
    assert expand(f"{tmp_path}/clip_{{000010,000008}}.tar") == [named[2], named[0]]
    assert expand("http://h/{9..11}_{a,b}.tar")[:3] == ["http://h/9_a.tar", "http://h/9_b.tar", "http://h/10_a.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "train_{000000..000003}.tar",
            r"no shard matches '.*train_\{000000..000003\}.tar'; .* 3 tars, such as tra1n_00000",
        ),
        ("tra1n_{000000..000003}.tar", r"1 of 4 shards are missing, the first .*tra1n_000003.tar"),
        ("*.tra", r"no shard matches .*holds 3 tars"),
        ("sub/x.tar", r"no shard matches .*sub/x.tar"),
        ("pipe:cat x.tar", "is a command to run"),
        ("s3://bucket/x.tar", "mount or fetch those of s3"),
        ([], "no shards are named"),
    ],
)
def test_what_matches_nothing_is_named_with_what_lies_nearest(
    pattern: str | list[str], message: str, tmp_path: Path
) -> None:
    for n in range(3):
        pack(tmp_path / f"tra1n_{n:06d}.tar", plain(1))
    where = pattern if isinstance(pattern, list) or ":" in pattern else str(tmp_path / pattern)
    with pytest.raises(InputError, match=message):
        read_shards(where)


def test_tars_elsewhere_and_packed_ones_are_pointed_at(tmp_path: Path) -> None:
    pack(tmp_path / "below" / "a.tar", plain(1))
    with pytest.raises(InputError, match=r"there are tars in .*below"):
        read_shards(tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(InputError, match=r"unpack them to \.tar"):
        read_shards(tmp_path / "packed" / "*.tar")
    (tmp_path / "packed" / "b.tar").write_bytes(b"\x1f\x8b\x08\x00" + bytes(2000))
    with pytest.raises(InputError, match=r"b\.tar is no tar .* unpack it"):
        read_shards(tmp_path / "packed")


# -------------------------------------------------------------------------------------------------------------- items


def test_key_and_kind_are_webdatasets() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("0001.jpg", "a.b/0001.txt0.txt", "deep/er/x.meta.json", "x.y.z/0.1.png"):
        assert split_key(name) == base_plus_ext(name), name
    assert split_key("A/0001.JPG") == ("A/0001", "jpg")
    assert split_key("README") == ("README", "")
    assert image_kind(["txt", "image.jpg", "png", "webp"]) == "png"
    assert image_kind(["mask.png", "jpg"]) == "jpg"
    assert image_kind(["txt", "npy"]) is None


def test_the_forms_of_captions(tmp_path: Path) -> None:
    assert said({"txt10.txt": b"c", "txt2.txt": b"b", "txt": b"a\n"}).texts == ["a", "b", "c"]
    assert said({"json": b'"one"'}).texts == ["one"]
    assert said({"json": b'["one", "two", 3]'}).texts == ["one", "two"]
    assert said({"json": b'{"caption": ["one", "two"], "n": 1}'}) == (["one", "two"], None, {"n": 1})
    assert said({"json": b'{"caption": "other"}', "txt": b"main"}) == (["main"], None, {"caption": "other"})
    assert said({"txt": b" ", "cls": b"7\n"}) == ([], "7", {})
    files = {"a.jpg": jpeg(1), "a.txt": b"one\ntwo\n", "a.0.txt": b"three", "b.jpg": jpeg(2), "b.txt": b"four"}
    tar = pack(tmp_path / "a.tar", files)
    m = read_shards(tar)
    assert m.column("text") == ["one\ntwo", "four"]
    assert m.captions() == [["one\ntwo", "three"], ["four"]]
    assert read_shards(tar, lines=True).captions() == [["one", "two", "three"], ["four"]]


def test_values_become_columns_and_the_label_is_no_category(tmp_path: Path) -> None:
    values = [
        {"category": "boots", "product_id": 7, "price": 1},
        {"category": "boots", "product_id": 7, "price": 2.5, "tags": ["x"]},
    ]
    files: dict[str, bytes] = {}
    for i, value in enumerate(values):
        files |= {f"{i}.jpg": jpeg(i), f"{i}.txt": b"a boot", f"{i}.meta.json": json.dumps(value).encode()}
    tar = pack(tmp_path / "a.tar", files)
    m = read_shards(tar)
    assert m.classes == ("a.tar/0", "a.tar/1"), "each item is a class of its own"
    assert (m.column("category"), m.column("price"), m.column("tags")) == (["boots"] * 2, [1, 2.5], [None, ["x"]])
    assert read_shards(tar, columns={"label": "product_id", "group": "category"}).classes == ("7",)
    with pytest.raises(InputError, match=r"no column 'product' \(columns.label\)"):
        read_shards(tar, columns={"label": "product"})
    more = pack(
        tmp_path / "b.tar",
        {"0.jpg": jpeg(), "0.json": b'{"Class": "mug", "text": "a mug", "image": "x", "price": "1"}'},
    )
    assert read_shards(more).classes == ("mug",)
    assert read_shards(more).column("text") == ["a mug"]
    assert read_shards([tar, more], columns={"label": "original_image"} | {"label": "price"}).classes == ("1", "2.5")


def test_a_key_twice_in_a_tar_is_an_error_and_in_two_a_note(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for content in (jpeg(0), jpeg(1)):
            info = tarfile.TarInfo("0.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=r"a.tar: the file 0.jpg is there twice"):
        read_shards(tmp_path / "a.tar")
    m = read_shards(tmp_path / "a.tar", on_error="skip")
    assert read_bytes(m.path(0)) == jpeg(0)
    assert "the first is used" in m.notes[0]
    both = read_shards([pack(tmp_path / "b.tar", plain(2)), pack(tmp_path / "c.tar", plain(2))])
    assert len(set(both.ids())) == len(both.classes) == 4
    assert both.notes == ("2 keys stand in several shards (first: 0000): taken as different items",)


def test_members_of_an_item_need_not_be_neighbours(tmp_path: Path) -> None:
    files = {"b.jpg": jpeg(0), "a.txt": b"of a", "a.jpg": jpeg(1), "b.txt": b"of b", "__meta.txt": b"", "x": b"no kind"}
    m = read_shards(pack(tmp_path / "a.tar", files))
    assert m.column("text") == ["of b", "of a"]
    assert read_bytes(m.path(1)) == jpeg(1)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_words_without_an_image_and_the_other_way_round_are_counted(tmp_path: Path) -> None:
    files = plain(4) | {"0009.txt": b"alone", "0008.jpg": jpeg(8), "0007.jpg": jpeg(7), "0007.json": b"{broken"}
    m = read_shards(pack(tmp_path / "a.tar", files))
    assert len(m) == 5
    assert m.column("text") == [f"picture {i}" for i in range(4)] + [None]
    assert m.notes[0].startswith(
        f"{tmp_path}/a.tar: 1 items left out whose text or values cannot be read (first: 0007: "
    )
    assert m.notes[1:] == (
        "1 item left out: words without an image (first: a.tar/0009)",
        "1 of 5 images have no caption (first: " + m.ids()[4] + ")",
    )
    assert check(m).notes == m.notes


@pytest.mark.parametrize("recorded", [True, False])
def test_of_a_tar_cut_short_all_whole_items_are_used_and_the_rest_is_counted(recorded: bool, tmp_path: Path) -> None:
    whole = pack(tmp_path / "a.tar", plain(10))
    full = read_shards(whole)
    content = whole.read_bytes()
    if recorded:
        (tmp_path / "shards.json").write_text(json.dumps({"a.tar": {"items": 10}}))
    ends = [Member.of(name).offset + Member.of(name).size for name in full.ids()]  # type: ignore[union-attr]
    starts = [Member.of(name).offset - 512 for name in full.ids()]  # type: ignore[union-attr]
    for cut, items in (
        (ends[6] - 100, 6),
        (ends[6] + 1, 6),
        (starts[7], 7),
        (starts[7] + 300, 7),
        (starts[7] + 512, 7),
    ):
        whole.write_bytes(content[:cut])
        m = read_shards(whole)
        assert m.column("text") == [f"picture {i}" for i in range(items)], cut
        for i in range(items):
            assert read_bytes(m.path(i)) == jpeg(i)
        (note,) = m.notes
        assert f"its {items} whole items are used" in note
        assert note.endswith(
            f"{10 - items} items lost"
            if recorded
            else ("1 item lost", "the rest is lost")[note.endswith("rest is lost")]
        )
    damaged = bytearray(content)
    damaged[starts[5] : starts[5] + 512] = b"x" * 512
    whole.write_bytes(damaged)
    m = read_shards(whole)
    assert (len(m), "damaged at byte" in m.notes[0]) == (5, True)


def test_what_is_no_tar_is_an_error_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"words " * 500)
    pack(tmp_path / "c.tar", plain(2))
    with pytest.raises(InputError, match=r"a.tar is no tar \(empty file\)"):
        read_shards(tmp_path)
    m = read_shards(tmp_path, on_error="skip")
    assert (len(m), [note.split(" (")[0] for note in m.notes]) == (
        2,
        [f"left out: {tmp_path}/{name}.tar is no tar" for name in "ab"],
    )
    with pytest.raises(InputError, match="no whole item in 1 shards"):
        read_shards(pack(tmp_path / "d.tar", {"0.txt": b"alone"}))


def test_a_broken_jpeg_is_skipped_as_in_any_manifest(tmp_path: Path) -> None:
    m = read_shards(pack(tmp_path / "a.tar", plain(3) | {"0003.jpg": jpeg()[:200], "0003.txt": b"x"}))
    with pytest.raises(InputError, match=r"a.tar/0003.jpg#\d+\+200: the image cannot be decoded"):
        list(eval_batches(m, eval_transform(SMALL), batch_size=2, workers=0))
    batches = eval_batches(m, eval_transform(SMALL), batch_size=2, workers=0, on_error="skip")
    assert sum(len(batch["image"]) for batch in batches) == 3
    assert [name for name, _ in batches.skipped] == [m.ids()[3]]


# -------------------------------------------------------------------------------------------------------------- indices


def test_a_tar_is_walked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = pack(tmp_path / "a.tar", plain(3))
    first = read_shards(tar)
    assert (tmp_path / ".a.tar.index").is_file()
    walked: list[Path] = []
    real = room._walk
    monkeypatch.setattr(room, "_walk", lambda path: (walked.append(path), real(path))[1])
    again = read_shards(tar)
    assert not walked
    assert again.table.equals(first.table)
    pack(tar, plain(4))
    assert len(read_shards(tar)) == 4
    assert walked == [tar]
    os.utime(tar, ns=(0, 0))
    read_shards(tar)
    assert len(walked) == 2, "another time: it may be another file"
    (tmp_path / ".a.tar.index").write_bytes(b"no index")
    assert len(read_shards(tar)) == 4
    assert len(walked) == 3
    assert not list(tmp_path.glob("*.part"))


def test_where_the_folder_cannot_be_written_to_the_index_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VICINAL_CACHE", str(tmp_path / "cache"))
    tar = pack(tmp_path / "a.tar", plain(3))
    (tmp_path / ".a.tar.index").mkdir()  # even root cannot replace a folder by a file
    read_shards(tar)
    assert len(list((tmp_path / "cache" / "shards").glob("*.index"))) == 1
    monkeypatch.setattr(room, "_walk", None)
    assert len(read_shards(tar)) == 3


def test_a_tar_that_changed_under_a_manifest_gives_no_other_picture(tmp_path: Path) -> None:
    tar = pack(tmp_path / "a.tar", plain(5))
    m = read_shards(tar)
    pack(tar, plain(5, start=3))
    for row in range(5):
        with pytest.raises(InputError, match="was written anew or cut since it was read"):
            decode(m.path(row))
    tar.unlink()
    assert m.missing().all()
    with pytest.raises(InputError, match="5 of 5 image files are missing"):
        m.refuse_missing()
    with pytest.raises(InputError, match="there is no such file"):
        m.image(0)


def test_what_a_manifest_can_do_it_does_with_shards(tmp_path: Path) -> None:
    photos = read_folder(write_folder(tmp_path / "photos", classes=4, each=3))
    write_shards(photos, tmp_path / "s" / "%03d.tar", items=5, seed=None)
    m = read_shards(tmp_path / "s")
    assert not m.missing().any()
    for write, read, name in ((write_table, read_table, "t.csv"), (Manifest.save, Manifest.load, "t.parquet")):
        write(m, tmp_path / name)
        again = read(tmp_path / name)
        assert all(torch.equal(again.image(i), photos.image(i)) for i in range(12))
    write_voc(m, tmp_path / "voc")
    assert len(read_voc(tmp_path / "voc")) == 12
    write_coco(m, tmp_path / "t.json")
    assert image_size(m.path(0)) == (48, 48)
    assert check(m).images == 12
    assert not check(m).errors
    (tmp_path / "deep").mkdir()
    assert torch.equal(m.rebased(tmp_path / "deep").image(7), photos.image(7))
    transform, sampler = train_transform(SMALL, "light"), ShuffleSampler(12, 4, seed=0)
    settings: dict[str, Any] = {"seed": 1, "workers": 0}
    for one, other, _ in zip(
        train_batches(m, transform, sampler, **settings),
        train_batches(photos, transform, sampler, **settings),
        range(4),
        strict=False,
    ):
        assert torch.equal(one["image"], other["image"])


def test_one_of_several_captions_is_drawn_at_each_look(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for i in range(6):
        files |= {f"{i}.jpg": jpeg(i)} | {f"{i}.txt{n}.txt": f"{i} {n}".encode() for n in range(3)}
    m = read_shards(pack(tmp_path / "a.tar", files))
    settings: dict[str, Any] = {"seed": 1, "workers": 0}
    looks = train_batches(m, eval_transform(SMALL), ShuffleSampler(6, 6, seed=0), **settings)
    drawn = [next(looks) for _ in range(12)]
    assert all(
        text.startswith(f"{row} ") for b in drawn for text, row in zip(b["text"], b["index"].tolist(), strict=True)
    )
    assert {text for batch in drawn for text in batch["text"]} == {f"{i} {n}" for i in range(6) for n in range(3)}
    later = train_batches(m, eval_transform(SMALL), ShuffleSampler(6, 6, seed=0), start_step=5, **settings)
    assert next(later)["text"] == drawn[5]["text"]
    (evaluated,) = eval_batches(m, eval_transform(SMALL), batch_size=6, workers=0)
    assert evaluated["text"] == [f"{i} 0" for i in range(6)], "evaluation takes the first"


# ---------------------------------------------------------------------------------------------------------------- parts


def test_parts_and_what_is_watched(tmp_path: Path) -> None:
    for n in range(6):
        pack(tmp_path / f"{n}.tar", plain(2))
    where = {"train": f"{tmp_path}/{{0..3}}.tar", "val": f"{tmp_path}/4.tar"}
    watched = {"train_eval": f"{tmp_path}/1.tar", "val_eval": f"{tmp_path}/5.tar"}
    m = read_shards(where | watched)
    assert m.column("split") == ["train"] * 8 + ["val"] * 4
    assert m.column("watched") == [False, False, True, True] + 4 * [False] + [False, False, True, True]
    assert len(m.classes) == 12
    (note,) = m.notes
    assert note.startswith("4 keys stand in several shards"), "two of train and two of val: each part may count from 0"
    assert not read_shards({"train": f"{tmp_path}/0.tar", "test": f"{tmp_path}/1.tar"}).notes
    for wrong, message in (
        ({"train_eval": f"{tmp_path}/5.tar"}, "5.tar is not among the shards of train"),
        ({"val_eval": f"{tmp_path}/1.tar"}, "1.tar is among the shards of train; what is selected on is not train"),
        ({"test": f"{tmp_path}/4.tar"}, "among the shards of val and of test"),
        ({"holdout": f"{tmp_path}/5.tar"}, "'holdout' is no part"),
    ):
        with pytest.raises(InputError, match=message):
            read_shards(where | wrong)


def test_a_recipe_names_shards(tmp_path: Path) -> None:
    for n in range(3):
        pack(tmp_path / f"{n}.tar", plain(2))
    least: dict[str, Any] = {"model": "timm:test_vit"}
    one = Recipe.parse(least | {"data": {"shards": f"{tmp_path}/{{0..2}}.tar"}})
    assert len(bring(one.data)) == 6
    parts = Recipe.parse(
        least | {"data": {"shards": {"train": [f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"], "val": f"{tmp_path}/2.tar"}}}
    )
    assert bring(parts.data).column("split") == ["train"] * 4 + ["val"] * 2
    assert Recipe.parse(json.loads(json.dumps(parts.model_dump(exclude_none=True)))) == parts
    with pytest.raises(InputError, match="did you mean 'train_eval'"):
        Recipe.parse(least | {"data": {"shards": {"train": "a", "train_evl": "b"}}})
    assert bring_path(tmp_path)[0] == bring_path(f"{tmp_path}/{{0..2}}.tar")[0] == "shards"
    with pytest.raises(InputError, match="it holds tars, which read_shards reads"):
        read_folder(tmp_path)


# -------------------------------------------------------------------------------------------------------------- writing


def rich(root: Path) -> Manifest:
    for i in range(6):
        draw("cross", (40, 160, 60), i).save(root / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
    return Manifest.build(
        {
            "image": [f"{i}.{('png', 'jpg', 'webp')[i % 3]}" for i in range(6)],
            "label": ["007", "7", "007", "a;b", "7", "ü"],
            "text": ["one", None, "two\nlines", 'a "quoted"', "NA", "x"],
            "captions": [["one", "uno"], None, None, ["quoted"], [], ["x", "y", "z"]],
            "box": [[0.1, 0.7, 20.3, 29.9], None, [1 / 3, 2, 40, 30], None, None, None],
            "group": ["g1", "g1", "g2", None, "g2", "g2"],
            "split": ["train", "train", "val", "test", "test", "val"],
            "price": [1, None, 2, 3, 4, 5],
        },
        root,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_comes_back(workers: int, tmp_path: Path) -> None:
    m = rich(tmp_path)
    paths = write_shards(m, tmp_path / "out" / "s_%04d.tar", items=2, seed=None, workers=workers)
    again = read_shards(tmp_path / "out" / "s_*.tar")
    assert [path.name for path in paths] == [f"s_{n:04d}.tar" for n in range(len(paths))]
    order = [m.column("text").index(text) for text in again.column("text")]
    for name in ("label", "text", "box", "group", "split", "price"):
        values = m.column(name)
        assert again.column(name) == [values[i] for i in order], name
    assert again.captions() == [m.captions()[i] for i in order]
    assert all(read_bytes(again.path(i)) == m.path(order[i]).read_bytes() for i in range(6))
    counts = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert {name: n["items"] for name, n in counts.items()} == {"s_0000.tar": 2, "s_0001.tar": 3, "s_0002.tar": 1}
    shard_of: dict[str, set[str]] = {}
    for image, group in zip(again.column("image"), again.column("group"), strict=True):
        shard_of.setdefault(group or image, set()).add(image.split("/")[0])
    assert all(len(shards) == 1 for shards in shard_of.values()), "no group straddles"
    import hashlib

    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == counts[path.name]["sha256"] for path in paths)


def test_shards_are_shuffled_by_seed_and_the_same_each_time(tmp_path: Path) -> None:
    m = read_folder(write_folder(tmp_path / "photos", classes=4, each=3))
    texts = [
        write_shards(m, tmp_path / str(n) / "%d.tar", items=6, seed=seed)[0].read_bytes()
        for n, seed in enumerate((0, 0, 1))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert sorted(read_shards(tmp_path / "0").column("label")) == sorted(m.column("label"))


def test_an_earlier_writing_is_replaced_and_what_is_not_ours_left_alone(tmp_path: Path) -> None:
    m = read_folder(write_folder(tmp_path / "photos", classes=4, each=3))
    write_shards(m, tmp_path / "s" / "a_%d.tar", items=2)
    write_shards(m, tmp_path / "s" / "b_%d.tar", items=6)
    write_shards(m, tmp_path / "s" / "a_%d.tar", items=4)
    assert sorted(p.name for p in (tmp_path / "s").glob("*.tar")) == [
        "a_0.tar",
        "a_1.tar",
        "a_2.tar",
        "b_0.tar",
        "b_1.tar",
    ]
    assert set(room.recorded(str(tmp_path / "s"))) == {"a_0.tar", "a_1.tar", "a_2.tar", "b_0.tar", "b_1.tar"}
    (tmp_path / "s" / "c_7.tar").write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"holds c_7.tar, of which no shards.json tells"):
        write_shards(m, tmp_path / "s" / "c_%d.tar")
    with pytest.raises(InputError, match="number of a shard as %06d"):
        write_shards(m, tmp_path / "s" / "d.tar")
    (tmp_path / "photos" / "cross-03" / "0.png").unlink()
    with pytest.raises(InputError, match=r"cross-03/0\.png: there is no such file"):
        write_shards(m, tmp_path / "s" / "e_%d.tar")
    assert not list((tmp_path / "s").glob("*.part"))


def test_prepare_writes_shards_of_each_part(tmp_path: Path) -> None:
    m = rich(tmp_path)
    paths = prepare(m, tmp_path / "out", format="shards")
    assert sorted(p.name for p in paths) == ["test_000000.tar", "train_000000.tar", "val_000000.tar"]
    whole = read_shards(tmp_path / "out" / "shards")
    assert sorted(whole.column("split")) == sorted(m.column("split"))
    paths = prepare(m, tmp_path / "out", format="shards", holdout=0.3, seed=1)
    assert {p.name.split("_")[0] for p in paths} == {"public", "holdout"}
    assert sorted(p.name for p in (tmp_path / "out" / "shards").glob("*.tar")) == sorted(p.name for p in paths)
    about = json.loads((tmp_path / "out" / "shards" / "split.json").read_text())
    held = read_shards(tmp_path / "out" / "shards" / "holdout_*.tar")
    assert set(held.classes) == set(about["holdout_classes"])
    assert Image.open(io.BytesIO(read_bytes(held.path(0)))).size == (48, 48)
