"""check: each fault planted and found, nothing found where nothing is wrong, and the page that a person reads."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vicinal.data import check as module
from vicinal.data.check import Findings, Leak, check, leaks
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_folder, read_table
from vicinal.types import InputError


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture like no other, smooth enough that JPEG keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def clean(tmp_path: Path) -> Manifest:
    """Three classes of six pictures; a split of 4, 1, 1."""
    images = []
    for i in range(18):
        images.append(f"{i // 6}/{i}.png")
        (tmp_path / images[-1]).parent.mkdir(exist_ok=True)
        noise(i).save(tmp_path / images[-1])
    split = [("train", "train", "train", "train", "val", "test")[i % 6] for i in range(18)]
    return Manifest.build({"image": images, "label": [i.split("/")[0] for i in images], "split": split}, tmp_path)


def replaced(m: Manifest, **columns: object) -> Manifest:
    table = {name: m.column(name) for name in m.names()}
    return Manifest.build({**table, **columns}, m.root)


def test_nothing_is_found_where_nothing_is_wrong(clean: Manifest):
    findings = check(clean)
    assert findings.errors == []
    assert findings.warnings == []
    assert findings.parts == {"train": (12, 3, 0), "val": (3, 3, 3), "test": (3, 3, 3)}
    assert findings.classes == {"0": 6, "1": 6, "2": 6}
    assert str(findings) == (
        "18 images in 18 files\n"
        "3 classes of 6 images each\n"
        "  train         12 images       3 classes\n"
        "  val            3 images       3 classes, 3 of them with one image\n"
        "  test           3 images       3 classes, 3 of them with one image\n"
        "\n"
        "Ready to train."
    )


def test_every_file_that_cannot_be_read_is_named(clean: Manifest):
    root = clean.root
    (root / "0/0.png").write_bytes((root / "0/0.png").read_bytes()[:300])  # cut short
    (root / "0/1.png").write_bytes(b"")
    (root / "0/2.png").write_text("<html>Not found</html>")
    (root / "0/3.png").unlink()
    findings = check(clean)
    assert [name for name, _ in findings.unreadable] == ["0/0.png", "0/1.png", "0/2.png", "0/3.png"]
    reasons = dict(findings.unreadable)
    assert "empty" in reasons["0/1.png"]
    assert "no such file" in reasons["0/3.png"]
    assert all(str(root) not in why and "on_error" not in why for why in reasons.values())
    assert len(findings.errors) == 1
    assert "4 image files cannot be read: 0/0.png (" in findings.errors[0]
    assert "and 1 more" in findings.errors[0]
    assert findings.duplicates == ()
    assert findings.near == (), "files that cannot be read are like no other, not even each other"


def test_the_same_pixels_are_found_whatever_the_bytes(clean: Manifest):
    root = clean.root
    noise(0).save(root / "1/7.png", compress_level=1)
    noise(0).save(root / "1/8.png", format="BMP")
    assert (root / "1/7.png").read_bytes() != (root / "0/0.png").read_bytes()
    findings = check(clean)
    assert findings.duplicates == (("0/0.png", "1/7.png", "1/8.png"),)
    assert findings.ambiguous == (("0/0.png", ("0", "1")),)
    assert findings.leaks == (), "all three are trained on"
    assert findings.near == (), "the same is not also near"
    assert any(
        w.startswith("2 files with the same pixels as another: 0/0.png = 1/7.png = 1/8.png") for w in findings.warnings
    )


def test_an_orientation_tag_is_part_of_the_picture(clean: Manifest):
    exif = Image.Exif()
    exif[0x0112] = 3
    noise(0).rotate(180).save(clean.root / "0/1.png", exif=exif)
    assert check(clean).duplicates == (("0/0.png", "0/1.png"),)


def test_pictures_in_two_parts_are_errors(clean: Manifest):
    noise(0).save(clean.root / "0/5.png")  # 0/0.png is trained on, 0/5.png tested
    findings = check(clean)
    assert findings.leaks == (Leak("0/0.png", "train", "0/5.png", "test"),)
    assert findings.errors == [
        "1 picture in more than one part of the split, so that what is measured was trained on: "
        "0/0.png (train) = 0/5.png (test). Keep one of each"
    ]
    images = clean.column("image")
    images[4] = images[0]  # the very file
    findings = check(replaced(clean, image=images))
    assert Leak("0/0.png", "train", "0/0.png", "val") in findings.leaks
    assert "0/0.png (train and val)" in findings.errors[0]


def test_a_picture_in_three_parts_is_told_of_twice(clean: Manifest):
    noise(0).save(clean.root / "0/4.png")
    noise(0).save(clean.root / "0/5.png")
    assert {(leak.part, leak.other_part) for leak in check(clean).leaks} == {("train", "val"), ("val", "test")}


@pytest.mark.parametrize("changed", ["quality", "half", "brighter"])
def test_near_duplicates_are_found(changed: str, clean: Manifest):
    image = noise(0, (256, 192))
    image.save(clean.root / "0/0.png")
    if changed == "half":
        image = image.resize((128, 96), Image.Resampling.BICUBIC)
    if changed == "brighter":
        image = image.point(lambda v: min(255, v + 6))
    image.save(clean.root / "0/5.png", format="JPEG", quality=60)
    findings = check(clean)
    assert findings.near == (("0/0.png", "0/5.png"),)
    assert findings.near_leaks == (Leak("0/0.png", "train", "0/5.png", "test"),)
    assert findings.duplicates == ()
    assert findings.errors == []
    assert len(findings.warnings) == 2
    quick = check(clean, near=False)
    assert quick.near == ()
    assert quick.notes == ("near duplicates were not looked for",)
    assert "notes (1)" in str(quick)


def test_plain_pictures_of_other_colours_are_not_near(tmp_path: Path):
    for i, colour in enumerate(((250, 250, 250), (0, 0, 0), (200, 30, 30), (30, 200, 30))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{i}.png")
    Image.new("RGB", (40, 40), (249, 250, 250)).save(tmp_path / "4.png")
    assert check(read_folder(tmp_path, labels=False)).near == (("0.png", "4.png"),)


def test_the_shape_is_part_of_the_picture(tmp_path: Path):
    for i, size in enumerate([(32, 8), (8, 32), (16, 16)]):
        Image.new("RGB", size, "red").save(tmp_path / f"{i}.png")
    assert check(read_folder(tmp_path, labels=False)).duplicates == ()


def test_marks_on_white_are_not_near(tmp_path: Path):
    for i, where in enumerate(itertools.product(range(3), range(3))):
        image = Image.new("RGB", (60, 60), "white")
        image.paste(Image.new("RGB", (9, 9), "black"), (where[0] * 20 + 5, where[1] * 20 + 5))
        image.save(tmp_path / f"{i}.png")
    assert check(read_folder(tmp_path, labels=False)).near == ()


def test_boxes_are_told_apart_and_kept_inside(clean: Manifest):
    images = ["0/0.png", "0/0.png", "0/0.png", "0/1.png", "0/1.png", "0/2.png"]
    boxes = [[0, 0, 30, 30], [30, 0, 64.5, 48], [30, 0, 66, 48], [-3, 0, 9, 9], None, [0, 0, 9, 49.5]]
    m = Manifest.build({"image": images, "label": list("aaabca"), "box": boxes}, clean.root)
    findings = check(m)
    assert findings.outside == (
        ("0/0.png", "box 30, 0, 66, 48 in 64 x 48 pixels"),
        ("0/1.png", "box -3, 0, 9, 9 in 64 x 48 pixels"),
        ("0/2.png", "box 0, 0, 9, 49.5 in 64 x 48 pixels"),
    )
    assert "3 boxes outside of the image" in findings.errors[0]
    assert findings.ambiguous == (), "two boxes of a photo may be of two classes"
    assert (findings.images, findings.files) == (6, 3)
    for row in range(6):  # what is said to be outside cannot be read, and the other way round
        if row in (2, 3, 5):
            with pytest.raises(InputError, match="outside"):
                m.image(row)
        else:
            m.image(row)


def test_repeated_rows_and_pictures_in_several_classes(clean: Manifest):
    m = Manifest.build({"image": ["0/0.png"] * 3 + ["0/1.png"], "label": ["x", "x", "y", "y"]}, clean.root)
    findings = check(m)
    assert findings.repeated == ("0/0.png#2",)
    assert findings.ambiguous == (("0/0.png", ("x", "y")),)
    assert "1 picture in several classes: 0/0.png (x and y)" in findings.warnings
    assert "1 row repeated: 0/0.png#2" in findings.warnings


def test_small_classes_are_told_of(clean: Manifest):
    labels = ["one", *["two"] * 2, *["four"] * 4, *["rest"] * 11]
    findings = check(replaced(clean, label=labels))
    assert findings.single == ("one",)
    assert findings.tiny == ("four", "two")
    assert any("1 class with a single image, kept out of MAP@R" in w and w.endswith("one") for w in findings.warnings)
    assert "4 classes of 1 (one) to 11 (rest) images, median 4" in str(findings)


def test_names_that_hardly_differ_are_told_of(clean: Manifest):
    labels = ["T-Shirt", "t shirt", "TShirt", *["Shirt"] * 15]
    assert check(replaced(clean, label=labels)).spelling == (("T-Shirt", "TShirt", "t shirt"),)


def test_a_split_column_with_unknown_words_is_an_error(clean: Manifest):
    findings = check(replaced(clean, split=["trian", *clean.column("split")[1:]]))
    assert findings.parts == {}
    assert "'trian' in row 1" in findings.errors[0]


def test_images_without_labels_or_split(clean: Manifest):
    m = Manifest.build({"image": clean.column("image")}, clean.root)
    findings = check(m)
    assert (findings.classes, findings.parts, findings.errors, findings.warnings) == ({}, {}, [], [])
    assert "no labels" in str(findings)


def test_findings_travel_as_json(clean: Manifest):
    noise(0).save(clean.root / "0/5.png")
    (clean.root / "2/17.png").unlink()
    findings = check(clean)
    whole = json.loads(json.dumps(findings.to_dict()))
    assert whole["leaks"] == [{"file": "0/0.png", "part": "train", "other": "0/5.png", "other_part": "test"}]
    assert whole["unreadable"][0][0] == "2/17.png"
    assert whole["errors"] == findings.errors
    assert whole["classes"] == {"0": 6, "1": 6, "2": 6}


def test_the_page_names_a_few_and_counts_the_rest(clean: Manifest):
    names = tuple((f"{i}.png", "the file is empty") for i in range(1000))
    findings = Findings(images=1000, files=1000, classes={"a": 1000}, unreadable=names)
    assert "1,000 image files cannot be read: 0.png (" in str(findings)
    assert "and 997 more" in str(findings)
    assert len(str(findings).splitlines()) < 10


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_finds_the_same(workers: int, clean: Manifest):
    noise(0).save(clean.root / "0/5.png", format="JPEG")
    (clean.root / "1/8.png").write_bytes(b"x")
    seen: list[tuple[int, int]] = []
    findings = check(clean, workers=workers, progress=lambda done, all_: seen.append((done, all_)))
    assert findings == check(clean)
    assert seen == [(i, 18) for i in range(1, 19)]


# ------------------------------------------------------------------------------------------------- the arithmetic


def near_by_hand(files: list[Path]) -> set[tuple[int, int]]:
    """Both steps for all pairs, one by one, in float64."""
    pictures = [Image.open(f).convert("RGB") for f in files]
    greys = [np.asarray(p.convert("L").resize((9, 8), Image.Resampling.BOX), float) for p in pictures]
    cells = [np.asarray(p.resize((16, 16), Image.Resampling.BOX), float).ravel() for p in pictures]
    found = set()
    for i, j in itertools.combinations(range(len(files)), 2):
        bits = sum(
            (greys[i][r, c + 1] - greys[i][r, c] > 2) != (greys[j][r, c + 1] - greys[j][r, c] > 2)
            for r in range(8)
            for c in range(8)
        )
        spread = max(cells[i].std(), cells[j].std(), 4.0)
        if bits <= 6 and np.sqrt(((cells[i] - cells[j]) ** 2).mean()) / spread <= 0.2:
            found.add((i, j))
    return found


def test_near_pairs_are_those_found_by_hand_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 5)
    rng = np.random.default_rng(0)
    for i in range(23):
        image = noise(i % 13)
        if i >= 13:
            grain = rng.normal(0, 4.0 * (i - 12), (48, 64, 3))
            image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
        image.save(tmp_path / f"{i:02d}.png")
    m = read_folder(tmp_path, labels=False)
    seen = module._look_at_all(m, m.column("image"), 1, None, near=True)
    pairs, notes = module._near_pairs(seen, 2)
    expected = near_by_hand(sorted(tmp_path.iterdir()))
    assert 3 <= len(expected) <= 20
    assert {tuple(p) for p in pairs.tolist()} == expected
    assert notes == []
    monkeypatch.setattr(module, "MOST_PAIRS", 2)
    pairs, notes = module._near_pairs(seen, 1)
    assert 2 < len(pairs) <= len(expected)
    assert notes == ["the search for near duplicates ended after 2 pairs"]


def test_bits_are_counted_with_and_without_numpy_2(monkeypatch: pytest.MonkeyPatch):
    words = np.random.default_rng(0).integers(0, 2**64, 500, dtype=np.uint64)
    words[:2] = (0, 2**64 - 1)
    expected = [int(w).bit_count() for w in words]
    assert module._popcount(words).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert module._popcount(words).tolist() == expected


def test_groups_hold_together_through_others():
    head = module._joined(np.array([[3, 1], [1, 5], [0, 4]]), 7)
    assert head.tolist() == [0, 1, 2, 1, 0, 1, 6]
    assert module._groups(head) == [[0, 4], [1, 3, 5]]


def test_the_cells_take_no_memory(clean: Manifest):
    seen = module._look_at_all(clean, clean.column("image"), 1, None, near=True)
    assert isinstance(seen.cells, np.memmap)


# ----------------------------------------------------------------------------------------------------------- leaks


def test_leaks_between_any_masks(clean: Manifest):
    rows = torch.arange(18)
    assert leaks(clean, {"seen": rows < 9, "unseen": rows >= 9}) == ()
    buffer = io.BytesIO()
    noise(2).save(buffer, format="BMP")
    (clean.root / "2/15.png").write_bytes(buffer.getvalue())
    assert leaks(clean, {"seen": rows < 9, "unseen": rows >= 9}) == (Leak("0/2.png", "seen", "2/15.png", "unseen"),)
    assert leaks(clean, {"seen": rows < 9, "unseen": rows >= 16}) == (), "rows in no part are not looked at"
    (clean.root / "2/17.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"2/17.png: .* `vicinal check` lists all such files"):
        leaks(clean, {"seen": rows < 9, "unseen": rows >= 9})


def test_two_boxes_of_a_photo_are_no_leak_but_the_same_box_is(clean: Manifest):
    noise(0).save(clean.root / "0/1.png")
    boxes = [[0, 0, 9, 9], [9, 9, 20, 20], [0, 0, 9, 9]]
    m = Manifest.build({"image": ["0/0.png", "0/0.png", "0/1.png"], "label": list("abc"), "box": boxes}, clean.root)
    parts = [torch.tensor([i == row for i in range(3)]) for row in range(3)]
    assert leaks(m, {"train": parts[0], "test": parts[1]}) == ()
    assert leaks(m, {"train": parts[0], "test": parts[2]}) == (Leak("0/0.png", "train", "0/1.png", "test"),)


# ------------------------------------------------------------------------------------------------------- real data


def test_real_data(real_data: Path):
    vehicles = check(read_table(real_data / "vehicle_logos" / "table.csv"))
    assert vehicles.errors == []
    assert set(vehicles.classes.values()) == {16}
    assert {group[0].split("/")[1] for group in vehicles.near} == {"Mercedes_1", "Mini"}, "seen to be so, by eye"
    emoji = read_table(real_data / "emoji" / "table.csv")
    runner = [i for i, name in enumerate(emoji.column("image")) if "blob/1F3C3" in name]
    findings = check(emoji.where(np.isin(np.arange(len(emoji)), runner)))
    assert ("images/blob/1F3C3.png", ("1F3C3", "1F3C3-200D-2642")) in findings.ambiguous
