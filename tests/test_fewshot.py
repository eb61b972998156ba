"""The few-shot table, from a folder of pictures to its files, with the packaged small image-text model."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pictures import draw, write_folder
from vicinal import Bottleneck, adapt, cli, embed, load_encoder, read_folder
from vicinal.embedding import embed_views
from vicinal.evaluation.few_shot_page import few_shot_page
from vicinal.fewshot import COLUMNS, DEFAULT_METHODS, Settings, Task, bring_source, fewshot
from vicinal.heads import HEADS
from vicinal.types import InputError

NANO = "vicinal:nano"


def no_words(line: str) -> None:
    pass


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(source: Path, out: Path, *words: str) -> dict[str, Any]:
    fewshot(NANO, source, Settings.parse([*words, "device=cpu"]), out, say=no_words)
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "shapes", classes=6, each=8)


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with a name a class, a style and a photographer a row, and a split."""
    home = tmp_path_factory.mktemp("styles")
    lines = ["image,label,title,style,sender,split"]
    for c, shape in enumerate(("ellipse", "rectangle", "triangle", "cross")):
        for i in range(9):
            style = ("plain", "grey", "turned")[i % 3]
            picture = draw(shape, (200, 40 + 40 * c, 40), i)
            picture = picture.convert("L").convert("RGB") if style == "grey" else picture
            picture = picture.rotate(90) if style == "turned" else picture
            picture.save(home / f"{shape}{i}.png")
            title = "" if shape == "cross" else f"a {shape}"
            part = ("train", "train", "train", "train", "val", "val", "test", "test", "test")[i]
            lines.append(f"{shape}{i}.png,c{c},{title},{style},{'abcdef'[i % 6]},{part}")
    (home / "table.csv").write_text("\n".join(lines))
    return home / "table.csv"


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    table(photos, out, "shots=[1,2,4]", "seeds=[1,2]", "methods=[zero_shot,tip_adapter,gda,clap,tip_adapter_f]")
    return out


def test_a_table_has_every_cell_with_its_interval(whole: Path):
    cells = rows(whole / "table.csv")
    assert tuple(cells[0]) == COLUMNS
    assert len(cells) == 5 * 3 * 2
    for cell in cells:
        assert float(cell["low"]) <= float(cell["accuracy"]) <= float(cell["high"])
        assert (cell["n"], cell["queries"], cell["part"]) == ("6", "24", "test")
        assert (cell["data"], cell["model"]) == ("shapes", NANO)
    pooled = rows(whole / "summary.csv")
    assert len(pooled) == 5 * 3
    for row in pooled:
        each = [float(c["accuracy"]) for c in cells if all(c[k] == row[k] for k in ("method", "shots"))]
        assert float(row["accuracy"]) == pytest.approx(sum(each) / 2, abs=1e-4)
        assert row["seed"] == "1+2"
    differences = rows(whole / "differences.csv")
    assert {row["against"] for row in differences} == {"zero_shot"}
    by = {(r["method"], r["shots"]): float(r["accuracy"]) for r in pooled}
    for row in differences:
        gain = by[row["method"], row["shots"]] - by["zero_shot", row["shots"]]
        assert float(row["difference"]) == pytest.approx(gain, abs=1e-4)


def test_the_policy_is_in_every_result(whole: Path):
    results = json.loads((whole / "results.json").read_text())
    assert results["few_shot"] is True
    for cell in results["cells"]:
        chooses = bool(HEADS[cell["method"]].hyperparameters)
        asked = cell["selection"]["asked"]
        assert asked == ("support_cv" if chooses else "fixed")
        one_shot = cell["shots"] == 1
        assert cell["policy"] == ("support_cv" if chooses and not one_shot else "fixed")
        assert bool(cell["selection"]["reason"]) == (chooses and one_shot)
        assert set(cell["selection"]["values"]) == set(HEADS[cell["method"]].hyperparameters)


def test_a_picture_and_a_page(whole: Path):
    with Image.open(whole / "accuracy.png") as picture:
        assert picture.size[0] > 500
    page = (whole / "report.html").read_text()
    assert page.count("<tr>") == 1 + 5 + 1 + 4
    assert "24 queries of 6 classes" in page
    assert 'class="best"' in page
    results = json.loads((whole / "results.json").read_text())
    assert few_shot_page(results) == page  # of the file alone
    results["data"]["name"] = "<script>"
    for row in results["differences"]:
        row["low"], row["high"] = -1.0, 1.0
    page = few_shot_page(results)
    assert "<script>" not in page
    assert 'class="sure"' not in page


def test_shots_and_features_are_what_they_are_said_to_be(photos: Path, tmp_path: Path):
    """One cell by hand: the rows of the draw, the vectors of `embed`, the head on its own."""
    results = table(photos, tmp_path, "shots=2", "seeds=3", "methods=nearest_prototype")
    settings = Settings.parse(["shots=2", "seeds=3"])
    manifest = read_folder(photos)
    task = Task.of(manifest, settings)
    shots, _ = task.draws(settings)[2, 3]
    assert not (shots & task.parts["test"]).any()
    vectors, labels = embed(load_encoder(NANO), manifest, device="cpu").vectors, manifest.labels()
    head = HEADS["nearest_prototype"]().fit(vectors[shots].numpy(), labels[shots].numpy())
    test = task.parts["test"]
    right = (head.predict(vectors[test].numpy()) == labels[test].numpy()).mean()
    assert results["cells"][0]["accuracy"] == pytest.approx(float(right), abs=1e-5)


def test_an_adapter_that_does_nothing_changes_nothing(photos: Path, tmp_path: Path):
    """Spec 14.4, 1: the up-projection is zero at the start, so adapted features are the frozen ones to the last bit."""
    encoder = load_encoder(NANO)
    still = adapt(encoder, Bottleneck(dim=4))
    still.save(tmp_path / "still")
    manifest = read_folder(photos)
    frozen = embed(encoder, manifest, device="cpu", precision="fp32").vectors
    assert torch.equal(embed(still, manifest, device="cpu", precision="fp32").vectors, frozen)
    with torch.no_grad():
        for name, parameter in still.named_parameters():
            if ".up." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    still.save(tmp_path / "moved")
    embed(still, manifest, device="cpu").save(tmp_path / "file.safetensors")
    names = f"adapter=[{tmp_path}/still,{tmp_path}/moved,{tmp_path}/file.safetensors]"
    results = table(photos, tmp_path / "out", "shots=[1,4]", "seeds=1", names)
    gained = [row for row in results["differences"] if row["adapter"]]
    usable = [name for name in DEFAULT_METHODS if HEADS[name].adapted_use == "yes"]
    assert "zero_shot" not in usable
    assert "linear_probe" not in usable  # it would put text and adapted features into one product
    assert {(row["adapter"], row["method"], row["shots"]) for row in gained} == {
        (name, method, k) for name in ("still", "moved", "file") for method in usable for k in (1, 4)
    }
    assert all(row["difference"] == row["low"] == row["high"] == 0 for row in gained if row["adapter"] == "still")
    assert any(row["difference"] for row in gained if row["adapter"] == "moved")
    of = {name: [row["difference"] for row in gained if row["adapter"] == name] for name in ("moved", "file")}
    assert of["file"] == of["moved"]
    assert "frozen features" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(InputError, match="a file of embeddings has no views"):
        table(photos, tmp_path / "x", "shots=1", "views=2", f"adapter={tmp_path}/file.safetensors")
    images = table(photos, tmp_path / "images", "shots=1", "seeds=1", "text=false", f"adapter={tmp_path}/moved")
    assert "linear_probe" in {row["method"] for row in images["cells"] if row["adapter"]}  # no text, no wall
    assert "zero_shot" not in {row["method"] for row in images["cells"]}


def test_views_are_of_the_picture_and_not_of_its_row(photos: Path, tmp_path: Path):
    encoder, manifest = load_encoder(NANO), read_folder(photos)
    settings = {"device": "cpu", "precision": "fp32", "workers": 0}
    three = embed_views(encoder, manifest, views=3, **settings)
    assert three.shape == (48, 3, encoder.embedding_dim)
    assert not torch.allclose(three[:, 0], three[:, 1], atol=1e-3)
    mask = torch.zeros(48, dtype=torch.bool)
    mask[[4, 17, 30]] = True
    few = embed_views(encoder, manifest.where(mask), views=2, cache=tmp_path, **settings)
    torch.testing.assert_close(few, three[mask, :2], atol=1e-4, rtol=1e-4)
    kept = embed_views(encoder, manifest.where(mask), views=2, cache=tmp_path, **settings)
    assert torch.equal(kept, few)
    assert not torch.allclose(embed_views(encoder, manifest.where(mask), views=1, seed=1, **settings)[:, 0], few[:, 0])
    plain = embed(encoder, manifest.where(mask), cache=tmp_path, **settings).vectors
    assert not torch.allclose(plain, torch.nn.functional.normalize(few[:, 0], dim=1), atol=1e-3)
    with pytest.raises(InputError, match="at least 1 view"):
        embed_views(encoder, manifest, views=0)


def test_views_are_averaged_or_stacked(photos: Path, tmp_path: Path):
    words = ("shots=2", "seeds=1", "methods=[gda,tip_adapter]", "views=3")
    mean = table(photos, tmp_path / "mean", *words)
    stack = table(photos, tmp_path / "stack", *words, "views_mode=stack")
    assert {c["selection"]["labels"] for c in mean["cells"] + stack["cells"]} == {12}  # three views are one image
    assert [c["selection"]["values"] for c in mean["cells"]] != [c["selection"]["values"] for c in stack["cells"]]


def test_policies_with_validation_and_transfer(styles: Path, tmp_path: Path):
    words = ("shots=2", "seeds=[1,2]", "methods=[gda,tip_adapter,zero_shot]")
    for policy, images in (("fewshot_val", 2), ("full_val", 2)):
        found = table(styles, tmp_path / policy, *words, f"policy={policy}")
        assert {c["policy"] for c in found["cells"] if c["method"] != "zero_shot"} == {policy}
        assert found["few_shot"] == (policy == "fewshot_val")
        assert {c["selection"]["labels"] for c in found["cells"] if c["method"] == "gda"} == {4 * 2 + 4 * images}
    moved = table(styles, tmp_path / "moved", *words, "policy=transfer", f"transfer={tmp_path / 'full_val'}")
    for method in ("gda", "tip_adapter"):
        chosen = [c["selection"]["values"]["alpha"] for c in found["cells"] if c["method"] == method]
        taken = {c["selection"]["values"]["alpha"] for c in moved["cells"] if c["method"] == method}
        assert taken == {sum(chosen) / 2}
    assert {c["policy"] for c in moved["cells"] if c["method"] == "gda"} == {"transfer"}
    with pytest.raises(InputError, match="has no gda at 1 shots to transfer from; it has gda at 2 shots"):
        table(styles, tmp_path / "x", "shots=1", "methods=gda", "policy=transfer", f"transfer={tmp_path / 'full_val'}")
    lacking = Settings.parse(["shots=[2,4]", "methods=gda", "policy=transfer", f"transfer={tmp_path / 'full_val'}"])
    with pytest.raises(InputError, match="has no gda at 4 shots"):  # before any model is looked for
        fewshot("timm:there-is-none", styles, lacking, tmp_path / "x", say=no_words)
    with pytest.raises(InputError, match="is not the table of a few-shot run"):
        table(styles, tmp_path / "x", "shots=1", "policy=transfer", f"transfer={tmp_path}")


def test_published_lists_are_taken_instead_of_drawing(styles: Path, tmp_path: Path):
    def write(train: list[str], val: list[str]) -> None:
        parts = {
            part: {"data": [{"impath": f"./data/x/{styles.parent.name}/{name}.png", "label": 0} for name in names]}
            for part, names in (("train", train), ("val", val))
        }
        (tmp_path / "shot_1-seed_5.json").write_text(json.dumps(parts))

    shapes = ("ellipse", "rectangle", "triangle", "cross")
    write([f"{shape}3" for shape in shapes], [f"{shape}5" for shape in shapes])
    settings = Settings.parse(["shots=1", "seeds=5", f"lists={tmp_path}"])
    manifest = bring_source(styles, settings)[2]
    shots, val = Task.of(manifest, settings).draws(settings)[1, 5]
    images = manifest.column("image")
    assert {images[i] for i in shots.nonzero().flatten().tolist()} == {f"{shape}3.png" for shape in shapes}
    assert {images[i] for i in val.nonzero().flatten().tolist()} == {f"{shape}5.png" for shape in shapes}
    found = table(
        styles, tmp_path / "out", "shots=1", "seeds=5", f"lists={tmp_path}", "methods=gda", "policy=fewshot_val"
    )
    assert found["cells"][0]["selection"]["labels"] == 8
    for train, says in (
        (["cross3", "cross8"], "cross8.png, which is asked about"),
        (["nobody"], "nobody.png, which the"),
    ):
        write(train, [])
        with pytest.raises(InputError, match=says):
            Task.of(manifest, settings).draws(settings)
    (tmp_path / "shot_1-seed_5.json").write_text("[]")
    with pytest.raises(InputError, match="does not hold train and val"):
        Task.of(manifest, settings).draws(settings)
    with pytest.raises(InputError, match=r"shot_1-seed_1.json cannot be read"):
        table(styles, tmp_path / "x", "shots=1", f"lists={tmp_path}")


def test_a_shift_is_asked_about_with_the_same_head(styles: Path, tmp_path: Path):
    words = ("shots=1", "seeds=1", "methods=[zero_shot,tip_adapter]", "shift=style", "source=plain")
    found = table(styles, tmp_path / "a", *words)
    assert set(found["data"]["parts"]) == {"style=plain", "style=grey", "style=turned"}
    assert found["data"]["parts"]["style=plain"] == 4  # of 12: 8 to train on
    of = {c["part"]: c["selection"] for c in found["cells"] if c["method"] == "tip_adapter"}
    assert len(of) == 3
    assert len({json.dumps(selection) for selection in of.values()}) == 1
    held_out = table(styles, tmp_path / "b", "shots=1", "seeds=1", "methods=gda", "group=sender")
    manifest = bring_source(styles, Settings())[2]
    divided = Task.of(manifest, Settings.parse(["shift=style", "source=plain"]))
    assert not (divided.pool & torch.stack(list(divided.parts.values())).any(0)).any()
    task = Task.of(manifest, Settings.parse(["group=sender"]))
    senders = manifest.column("sender")
    asked = {s for s, m in zip(senders, task.parts["test"].tolist(), strict=True) if m}
    drawn = {s for s, m in zip(senders, task.pool.tolist(), strict=True) if m}
    assert asked
    assert not asked & drawn
    assert held_out["data"]["parts"]["test"] == int(task.parts["test"].sum())
    for words, says in (
        (["shift=style", "source=blue"], "shift=style: source=blue of grey, plain, turned"),
        (["shift=hue", "source=blue"], "no column 'hue'"),
        (["shift=style"], "shift=COLUMN and source=VALUE"),
        (["shift=style", "source=plain", "group=sender"], "give shift or group"),
    ):
        with pytest.raises(InputError, match=says):
            Task.of(manifest, Settings.parse(words))


def test_groups_beside_a_split(styles: Path, tmp_path: Path):
    """The split says who is asked about; of their groups nothing is drawn, and none is both drawn and chosen on."""
    settings = Settings.parse(["group=sender", "device=cpu"])
    manifest = bring_source(styles, settings)[2]
    senders, splits = manifest.column("sender"), manifest.column("split")
    assert {s for s, part in zip(senders, splits, strict=True) if part == "test"} == set("abc")
    with pytest.raises(InputError, match="class 'c0' is empty where support is drawn from"):
        Task.of(manifest.where(torch.tensor([s in "abc" for s in senders])), settings)
    task = Task.of(manifest, settings)
    assert {senders[i] for i in task.pool.nonzero().flatten().tolist()} == {"d"}
    assert {senders[i] for i in task.val.nonzero().flatten().tolist()} == {"e", "f"}
    assert {splits[i] for i in task.parts["test"].nonzero().flatten().tolist()} == {"test"}
    assert task.parts["test"].sum() == 12
    assert task.notes == ("12 images are not drawn: their sender is asked about",)


def test_another_data_set_is_asked_about(photos: Path, tmp_path: Path):
    other = write_folder(tmp_path / "sketches", classes=3, each=2)
    for path in other.glob("*/*.png"):
        with Image.open(path) as picture:
            turned = picture.rotate(40)
        turned.save(path)
    words = ("shots=2", "seeds=1", "methods=[gda,nearest_prototype]", f"also={other}")
    every = table(photos, tmp_path / "a", *words)
    assert every["data"]["also"] == {"sketches": 6}
    part = table(photos, tmp_path / "b", *words, "candidates=part")
    for method in ("gda", "nearest_prototype"):
        a, b = (
            next(c["accuracy"] for c in found["cells"] if (c["method"], c["part"]) == (method, "sketches"))
            for found in (every, part)
        )
        assert b >= a
    write_folder(tmp_path / "others", classes=7, each=1)
    with pytest.raises(InputError, match=r"others has class 'triangle-06' .*which the first data set does not have"):
        table(photos, tmp_path / "c", "shots=1", f"also={tmp_path / 'others'}")


def test_names_come_from_a_column_and_must_be_there(styles: Path, tmp_path: Path):
    with pytest.raises(InputError, match="class 'c3' has no name in the column title"):
        table(styles, tmp_path / "x", "shots=1", "names=title")
    text = styles.read_text().replace(",c3,,", ",c3,a cross,")
    named = styles.with_name("named.csv")
    named.write_text(text)
    by_name = table(named, tmp_path / "a", "shots=1", "seeds=1", "methods=zero_shot", "names=title", "templates={}")
    assert by_name["settings"]["names"] == "title"
    other = styles.with_name("other.csv")
    other.write_text(text.replace("image,label", "file,kind", 1))
    again = table(
        other, tmp_path / "b", "shots=1", "seeds=1", "methods=zero_shot", "names=title", "templates={}",
        "columns.image=file", "columns.label=kind",
    )  # fmt: skip
    assert [c["accuracy"] for c in again["cells"]] == [c["accuracy"] for c in by_name["cells"]]
    with pytest.raises(InputError, match="no column 'nickname'"):
        table(named, tmp_path / "x", "shots=1", "names=nickname")


def test_the_same_picture_on_two_sides(photos: Path, tmp_path: Path):
    copy = write_folder(tmp_path / "shapes", classes=3, each=6)
    for folder in copy.iterdir():
        with Image.open(folder / "0.png") as picture:
            for name in ("copy", "again", "third"):
                picture.save(folder / f"{name}.bmp")
    with pytest.raises(InputError, match=r"could hold \d query images: the same pixels stand in .*leaks=drop"):
        table(copy, tmp_path / "x", "shots=1")
    found = table(copy, tmp_path / "a", "shots=1", "seeds=1", "leaks=drop", "methods=nearest_prototype")
    assert any("not drawn: the same pixels" in note for note in found["data"]["notes"])


def test_too_few_images_and_empty_classes_are_named(photos: Path, styles: Path, tmp_path: Path):
    small = write_folder(tmp_path / "small", classes=3, each=6)
    (small / "rectangle-01" / "5.png").unlink()
    (small / "rectangle-01" / "4.png").unlink()
    with pytest.raises(InputError, match="class 'rectangle-01' has 2 images to draw from, fewer than the 3 shots;"):
        table(small, tmp_path / "x", "shots=[1,3]")
    took = table(small, tmp_path / "a", "shots=3", "seeds=1", "methods=gda", "fewer=take")
    assert took["cells"][0]["selection"]["labels"] == 8
    left = table(small, tmp_path / "b", "shots=3", "seeds=1", "methods=gda", "min_images=6")
    assert left["data"]["classes"] == 2
    words = styles.read_text().replace(
        "ellipse0.png,c0,a ellipse,plain,a,train", "ellipse0.png,c0,a ellipse,plain,a,test"
    )
    for i in (1, 2, 3):
        words = words.replace(f"ellipse{i}.png,c0,", f"ellipse{i}.png,c1,")
    empty = styles.with_name("empty.csv")
    empty.write_text(words)
    with pytest.raises(InputError, match="class 'c0' is empty where support is drawn from, and has 4 images"):
        table(empty, tmp_path / "x", "shots=1")
    with pytest.raises(InputError, match="leaves no class; the largest has 8"):
        table(photos, tmp_path / "x", "min_images=9")
    with pytest.raises(InputError, match="policy full_val needs validation rows"):
        table(photos, tmp_path / "x", "shots=1", "policy=full_val")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["policy=oracle_test"], "policy oracle_test would choose hyper-parameters on the test set"),
        (["policy=luck"], "policy 'luck' is unknown"),
        (["methods=[gda,tip]"], "methods: 'tip'; there are zero_shot, nearest_prototype"),
        (["methods=[]"], "methods: none"),
        (["methods=[gda,gda]"], "names one twice"),
        (["shots=0"], "shots.0: Input should be greater than or equal to 1"),
        (["shot=1"], "shot: unknown key; did you mean 'shots'"),
        (["policy=transfer"], "policy=transfer and transfer=FOLDER"),
        (["views_mode=stack"], "nothing to stack"),
        (["augment=wild"], "augment='wild' is unknown"),
        (["templates=photo"], "has no {} for the name"),
        (["holdout=1"], "holdout: Input should be less than 1"),
        (["seeds"], "is not an override"),
    ],
)
def test_settings_that_no_data_mends(words: list[str], says: str):
    with pytest.raises(InputError, match=says):
        Settings.parse(words)


def test_a_source_may_be_a_recipe(photos: Path, tmp_path: Path):
    recipe = tmp_path / "ours.yaml"
    recipe.write_text(f"data: {{folder: {photos}, min_images: 2}}\nmodel: anything\n")
    name, kind, manifest = bring_source(recipe, Settings())
    assert (name, kind, len(manifest)) == ("ours", "folder", 48)
    recipe.write_text("model: anything\n")
    with pytest.raises(InputError, match="is no recipe with a key data"):
        bring_source(recipe, Settings())
    with pytest.raises(InputError, match="cannot be read"):
        bring_source(tmp_path / "nothing.yaml", Settings())
    with pytest.raises(InputError, match="coop_dtd is missing from"):
        bring_source("coop_dtd", Settings(root=str(tmp_path)))


def test_one_class_to_ask_about_has_no_interval(photos: Path, tmp_path: Path):
    other = write_folder(tmp_path / "one", classes=1, each=2)
    for path in other.glob("*/*.png"):
        with Image.open(path) as picture:
            turned = picture.rotate(30)
        turned.save(path)
    table(photos, tmp_path / "out", "shots=1", "seeds=1", "methods=gda", f"also={other}")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    content = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse)
    cell = next(cell for cell in content["cells"] if cell["part"] == "one")
    assert (cell["low"], cell["high"], cell["n"]) == (None, None, 1)
    assert next(row for row in rows(tmp_path / "out" / "table.csv") if row["part"] == "one")["low"] == ""


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["fewshot", NANO, str(photos), "methods=[gda]", "shots=[1,2]", "seeds=1", "device=cpu", f"out={tmp_path}"]
    cli.app(words, standalone_mode=False)
    said = capsys.readouterr().out
    assert "2 shots" in said
    assert str(tmp_path / "report.html") in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.csv", "summary.csv", "differences.csv", "results.json", "accuracy.png", "report.html",
    }  # fmt: skip


def test_the_help_lists_every_key() -> None:
    from vicinal.cli import fewshot as command

    words = set(re.findall(r"\w+", command.__doc__ or ""))
    assert set(Settings.model_fields) <= words
