"""The command line: one word a verb, each a thin call of one public function; settings are `key=value`."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from vicinal.types import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="vicinal",
    help="Adapt a pretrained image or image-text embedding model to your own domain, and prove that it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

_with_place = warnings.formatwarning  # Python's own

Overrides = Annotated[list[str] | None, typer.Argument(help="`key=value`: overrides of the recipe, and `out=FOLDER`.")]
Source = Annotated[Path, typer.Argument(help="A folder of class folders, a table, COCO JSON, VOC, or shards.")]
Model = Annotated[
    str, typer.Argument(help="`timm:NAME`, `open_clip:NAME/TAG`, `transformers:ID`, `vicinal:nano`, a folder.")
]


Columns = Annotated[list[str] | None, typer.Option("--column", help="`label=brand`: a column by its name there.")]


def main() -> None:
    """Run the command line; what the user gave wrong ends in one clear line, not in a trace."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("vicinal").setLevel(logging.INFO)  # the licence of a model, before it is downloaded
    warnings.formatwarning = _told
    code: int | str | None
    try:
        code = app()
    except InputError as error:
        print(f"vicinal: {error}", file=sys.stderr)
        code = 2
    except SystemExit as ended:
        code = ended.code
    if code == 130:  # typer's for Ctrl-C
        print("vicinal: stopped; what was computed is kept", file=sys.stderr)
    if "WORLD_SIZE" in os.environ:  # torchrun's
        from vicinal.training.devices import leave

        leave(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


@app.command()
def init(
    source: Source,
    out: Annotated[Path, typer.Option(help="Where to write the recipe.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="The model to begin with.")] = "open_clip:ViT-B-16/datacomp_xl_s13b_b90k",
    columns: Columns = None,
) -> None:
    """Write a recipe for your folder or table, with what was found in it."""
    from vicinal.bring import bring_path
    from vicinal.recipe import starter

    kind, manifest = bring_path(source, _pairs(columns))
    if out.exists():
        raise InputError(f"{out} exists already; name another with --out")
    out.write_text(starter(kind, source, manifest, model, _pairs(columns)), encoding="utf-8")
    print(f"{len(manifest):,} images of {len(manifest.classes):,} classes found.\nWritten: {out}")
    print(f"Next:    vicinal check {source}\n         vicinal train {out} out=runs/{source.stem}")


@app.command()
def check(
    source: Source,
    columns: Columns = None,
    near: Annotated[bool, typer.Option(help="Look for near duplicates too.")] = True,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the findings here as well.")] = None,
) -> None:
    """Say what is in the data and what is wrong with it, before the first minute of training."""
    from vicinal.bring import bring_path
    from vicinal.data.check import check as check_manifest

    _, manifest = bring_path(source, _pairs(columns), check_files=False)
    findings = check_manifest(manifest, near=near)
    print(findings)
    if json_out:
        json_out.write_text(json.dumps(findings.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
    if findings.errors:
        raise typer.Exit(1)


@app.command()
def prepare(
    source: Source,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    holdout: Annotated[
        float | None, typer.Option(help="Share of the classes held out; by default 0.2, of shards none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle of the sorted classes.")] = 42,
    format: Annotated[
        str, typer.Option(help="coco, parquet, shards, or logos: references, scenes, a database.")
    ] = "coco",
    references: Annotated[int, typer.Option(help="Of logos: the most of a brand.")] = 5,
    columns: Columns = None,
) -> None:
    """Write public and holdout tables by ratio and seed; images stay where they are, but for shards and logos."""
    from vicinal.bring import bring_path
    from vicinal.data.logos import write_logos
    from vicinal.data.sources import prepare as prepare_manifest

    _, manifest = bring_path(source, _pairs(columns))
    if format == "logos":
        share = 0.2 if holdout is None else holdout
        print(write_logos(manifest, out, holdout=share, seed=seed, references=references))
        return
    for path in prepare_manifest(manifest, out, holdout=holdout, seed=seed, format=format):
        print(path)


@app.command()
def embed(
    model: Model,
    source: Source,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    size: Annotated[int | None, typer.Option(help="Input size in pixels.")] = None,
    device: str = "auto",
    columns: Columns = None,
) -> None:
    """Embed every image once, to a file of unit vectors, labels and ids."""
    from vicinal.bring import bring_path, open_uri
    from vicinal.embedding import default_cache
    from vicinal.embedding import embed as embed_manifest

    _, manifest = bring_path(source, _pairs(columns))
    encoder = open_uri(model, size=size)
    embeddings = embed_manifest(encoder, manifest, cache=default_cache(), device=device)
    embeddings.save(out, fingerprint=encoder.fingerprint())
    print(f"{out}: {len(embeddings):,} vectors of {embeddings.vectors.shape[1]} numbers")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="`last`, or a checkpoint: go on from there.")] = None,
) -> None:
    """Adapt a model as a recipe says, prove what it did, and write the page."""
    from vicinal.recipe import Recipe
    from vicinal.run import run

    settings = [o for o in overrides or [] if not o.startswith("out=")]
    out = next((o.removeprefix("out=") for o in overrides or [] if o.startswith("out=")), f"runs/{recipe.stem}")
    run(Recipe.load(recipe, settings), out, resume=resume)


@app.command("eval")
def evaluate(
    model: Model,
    catalog: Annotated[Path, typer.Option(help="The images to find classes among.")],
    queries: Annotated[Path, typer.Option(help="The images to name.")],
    k: Annotated[list[int] | None, typer.Option(help="Shots a class; give several.")] = None,
    more: Annotated[list[str] | None, typer.Argument(help="More numbers of shots.")] = None,
    size: Annotated[int | None, typer.Option(help="Input size in pixels.")] = None,
    device: str = "auto",
    columns: Columns = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the metrics here as well.")] = None,
) -> None:
    """Measure a model or a run on separate catalog and query files: `--k 1 3 10`."""
    from dataclasses import asdict

    from vicinal.bring import bring_path, open_uri
    from vicinal.embedding import default_cache
    from vicinal.run import evaluate as evaluate_model

    shots = [*(k or ([] if more else [1, 3, 10])), *(_whole(word) for word in more or [])]
    metrics = evaluate_model(
        open_uri(model, size=size),
        bring_path(catalog, _pairs(columns))[1],
        bring_path(queries, _pairs(columns))[1],
        shots=shots,
        cache=default_cache(),
        device=device,
    )
    for name, estimate in metrics.items():
        print(f"{name:18} {estimate}   {estimate.n} classes, {estimate.queries:,} queries")
    if json_out:
        json_out.write_text(json.dumps({k: asdict(v) for k, v in metrics.items()}, indent=1), encoding="utf-8")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A run folder, or any model; `threshold.json` comes beside it.")],
    source: Annotated[Path | None, typer.Argument(help="Classes it was not trained on. None: the run's own.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Pictures to ask about; SOURCE's are then references.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="A model to compare with; `start`: what the run began with.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Share of unknown queries accepted; else the best F1.")] = None,
    confidence: Annotated[
        float, typer.Option(help="With which the rate holds for other classes; at 0.5 as often passed as not.")
    ] = 0.95,
    gallery: Annotated[int | None, typer.Option(help="Of the rate: how many classes will be enrolled.")] = None,
    fusion: Annotated[str, typer.Option(help="max, mean, topk or multi-ref.")] = "topk",
    top: Annotated[
        int, typer.Option("-k", min=1, help="How many of a class's nearest references topk and multi-ref look at.")
    ] = 3,
    margin: Annotated[float, typer.Option(help="How far the second class must be behind.")] = 0.02,
    references: Annotated[int, typer.Option(help="The most a class, where they are drawn.")] = 5,
    seed: Annotated[int, typer.Option(help="Of draws and halves.")] = 42,
    size: Annotated[int | None, typer.Option(help="Input size in pixels.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where plots and scores go; else beside the model.")] = None,
    device: str = "auto",
    columns: Columns = None,
) -> None:
    """Fit the score from which on an answer counts, on classes the model has not seen, and show what it is worth."""
    from vicinal.calibrate import calibrate as calibrate_model

    if fusion not in ("max", "mean", "topk", "multi-ref"):
        raise InputError(f"--fusion {fusion}: there are max, mean, topk and multi-ref")
    calibrate_model(
        model,
        source,
        queries=queries,
        baseline=baseline,
        rate=rate,
        confidence=confidence,
        gallery=gallery,
        settings={"fusion": fusion, "k": top, "margin": margin},
        references=references,
        seed=seed,
        size=size,
        columns=_pairs(columns),
        out=out,
        device=device,
    )


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[list[str], typer.Option(help="One of transformers, open_clip, … (an error lists all); several.")],
    tolerance: Annotated[float, typer.Option(help="The largest difference between the vectors of both.")] = 1e-3,
    pictures: Annotated[Path | None, typer.Option(help="Compare on eight of these; else on drawn ones.")] = None,
    push: Annotated[str | None, typer.Option("--push-to-hub", help="ORG/NAME: upload the folder, too.")] = None,
) -> None:
    """Write a model for other libraries; each export is loaded there and compared before it is kept."""
    from vicinal.bring import bring_pictures, open_uri
    from vicinal.serving.card import of_run
    from vicinal.serving.export import export as export_encoder
    from vicinal.serving.export import push_to_hub
    from vicinal.serving.objects import THRESHOLD_NAME

    home = Path(model).expanduser()
    fitted = home / THRESHOLD_NAME  # what `vicinal calibrate` wrote
    shown = None
    if pictures is not None:
        some = bring_pictures([pictures])
        shown = list(dict.fromkeys(str(some.path(row)) for row in range(min(len(some), 64))))[:8]
    folder = export_encoder(
        open_uri(model),
        out,
        format=format,
        pictures=shown,
        tolerance=tolerance,
        card=of_run(home),
        threshold=fitted if fitted.is_file() else None,
    )
    print(push_to_hub(folder, push) if push else folder)


@app.command()
def index(
    model: Annotated[str | None, typer.Argument(help="The model; left out where something is only removed.")] = None,
    source: Annotated[Path | None, typer.Argument(help="The pictures: a folder, table, COCO, VOC.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="The .index file to write.")],
    add: Annotated[bool, typer.Option("--add", help="Add to what is in the file.")] = False,
    remove: Annotated[list[str] | None, typer.Option(help="Take this item out of the file; give several.")] = None,
    faiss: Annotated[str | None, typer.Option(help="Approximate, by a recipe of faiss: HNSW32. Else exact.")] = None,
    size: Annotated[int | None, typer.Option(help="Input size in pixels.")] = None,
    device: str = "auto",
    columns: Columns = None,
) -> None:
    """Embed pictures into one file to search in; add to it, or take out of it."""
    from vicinal.bring import bring_pictures, open_uri
    from vicinal.embedding import default_cache
    from vicinal.embedding import embed as embed_manifest
    from vicinal.serving.index import Index

    if not remove and (model is None or source is None):
        raise InputError("name the model and the pictures; or --remove ID, to take something out")
    if out.exists() and not (add or remove):
        raise InputError(f"{out} exists already; --add to it, or name another with --out")
    found = Index.load(out) if add or remove else None
    if found is not None and faiss not in (None, found.faiss):
        raise InputError(f"--faiss {faiss}: {out} was made {found.faiss or 'exact'}, and stays so; make another file")
    if remove:
        assert found is not None
        found.remove(remove)
    if model is not None and source is not None:
        encoder = open_uri(model, size=size)
        fingerprint = encoder.fingerprint()
        if found is None:  # an emptied one is still its model's
            found = Index(fingerprint, faiss=faiss, about={"model": model, "size": size})
        manifest = bring_pictures([source], _pairs(columns))
        embeddings = embed_manifest(encoder, manifest, cache=default_cache(), device=device)
        found.add(embeddings, fingerprint=fingerprint)
    assert found is not None
    print(f"{found.save(out)}: {len(found):,} items of {len(found.classes):,} classes, {found.dim} numbers each")


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="What `vicinal index` wrote.")],
    queries: Annotated[list[Path] | None, typer.Argument(help="Image files, or one folder or table.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Ask in words; give several.")] = None,
    vectors: Annotated[Path | None, typer.Option(help="Ask by vectors that `vicinal embed` wrote.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many neighbours.", min=1)] = 5,
    model: Annotated[str | None, typer.Option(help="Where the index's model is, if it has moved.")] = None,
    device: str = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the neighbours here as well.")] = None,
) -> None:
    """Find the nearest items of an index: by picture, by words, by vectors."""
    from vicinal.bring import bring_pictures, open_uri
    from vicinal.embedding import default_cache, embed_text
    from vicinal.embedding import embed as embed_manifest
    from vicinal.serving.index import Index
    from vicinal.types import Embeddings

    if sum(map(bool, (queries, text, vectors))) != 1:
        raise InputError("ask by pictures, by --text or by --vectors: one of them")
    found = Index.load(index)
    if vectors is not None:
        asked = Embeddings.load(vectors)
        vector, fingerprint, names = asked.vectors, Embeddings.fingerprint_in(vectors), list(asked.ids)
    else:
        uri, size = model or found.about.get("model"), found.about.get("size")
        if uri is None:
            raise InputError(f"{index} does not say where its model is; name it by --model")
        encoder = open_uri(str(uri), size=None if size is None else int(size))
        fingerprint = encoder.fingerprint()
        if text:
            vector, names = embed_text(encoder, text, device=device), text
        else:
            asked = embed_manifest(encoder, bring_pictures(queries or []), cache=default_cache(), device=device)
            vector, names = asked.vectors, list(asked.ids)
    scores, rows = found.neighbours(vector, k, fingerprint=fingerprint)
    answers = []
    for name, near, cosines in zip(names, rows.tolist(), scores.tolist(), strict=True):
        print(name)
        neighbours: list[dict[str, Any]] = []
        for row, cosine in zip(near, cosines, strict=True):
            if row >= 0:  # faiss may leave a place empty
                label = int(found.labels[row])
                kind = None if label < 0 else found.classes[label]
                neighbours.append({"id": found.ids[row], "class": kind, "score": round(cosine, 6)})
                print(f"  {len(neighbours):3}  {cosine:.3f}  {kind or '-'}  {found.ids[row]}")
        answers.append({"query": name, "neighbours": neighbours})
    if json_out:
        json_out.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@app.command()
def match(
    source: Annotated[list[Path] | None, typer.Argument(help="Pictures: files, a folder, or a table.")] = None,
    *,
    references: Annotated[Path, typer.Option(help="Of each class: class folders, a table, an .index, a .matcher.")],
    model: Annotated[list[str], typer.Option("--model", "-e", help="The embedding model; with --truth several.")],
    detector: Annotated[str | None, typer.Option(help="A detector of transformers: folder or Hub id.")] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option("--threshold", "-t", help="A number, or a file of `vicinal calibrate`."),
    ] = None,
    fusion: Annotated[
        str | None, typer.Option("--fusion", "--matching-method", help="max, mean, topk or multi-ref.")
    ] = None,
    k: Annotated[
        int | None, typer.Option(help="How many of a class's nearest references topk and multi-ref look at.")
    ] = None,
    margin: Annotated[float | None, typer.Option(help="How far the second class must be behind.")] = None,
    detect_threshold: Annotated[float, typer.Option(help="From which score on a box is looked at.")] = 0.5,
    overlap: Annotated[float, typer.Option(help="Of two boxes that overlap more, the better stays.")] = 0.7,
    pad: Annotated[float | None, typer.Option(help="Widens boxes. Else a detector's by 0.08, given ones not.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write: JSON, CSV and pictures.")] = None,
    pictures: Annotated[bool, typer.Option(help="Draw what was found.")] = True,
    truth: Annotated[Path | None, typer.Option(help="Measure on VOC, COCO, or a table with boxes and classes.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Of the truth, so many pictures. All.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of -n.")] = 42,
    baseline: Annotated[bool, typer.Option("--baseline", help="Measure what each run began with, too.")] = False,
    size: Annotated[int | None, typer.Option(help="Input size in pixels.")] = None,
    device: str = "auto",
    columns: Columns = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the metrics here as well.")] = None,
) -> None:
    """Find objects in pictures and name them, or say that they are unknown; with --truth, measure how often rightly."""
    from vicinal.recognise import Settings, match_pictures, measure_models

    settings = Settings(
        references=references,
        detector=detector,
        thresholds=tuple(threshold or ()),
        fusion=fusion,
        k=k,
        margin=margin,
        detect_threshold=detect_threshold,
        overlap=overlap,
        pad=pad,
        size=size,
        device=device,
        columns=_pairs(columns),
    )
    if (truth is None) == (not source):
        raise InputError("give pictures to look at, or --truth, a table of what is in them: one of the two")
    if truth is None:
        if out is None:
            raise InputError("name the folder to write with --out")
        match_pictures(source or [], model, settings, out=out, pictures=pictures)
    else:
        measure_models(truth, model, settings, count=n, seed=seed, baseline=baseline, out=out, json_out=json_out)


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="A finished run.")]) -> None:
    """Make a run's page anew, from its files."""
    from vicinal.run import remake_report

    print(remake_report(run_folder))


@app.command()
def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="`out=FOLDER`, where the run goes.")] = None,
    show: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Show the whole idea in a few minutes, on built-in data with a built-in model: `vicinal demo out=demo`."""
    from vicinal.demo import demo as run_demo

    words = overrides or []
    if wrong := [word for word in words if not word.startswith("out=")]:
        raise InputError(f"{wrong[0]}: the demo takes out=FOLDER and nothing else; for the rest, vicinal train")
    run_demo(words[-1].removeprefix("out=") if words else "demo", show=show)


@app.command()
def fewshot(
    model: Model,
    source: Annotated[str, typer.Argument(help="A folder, a table, a benchmark's name, or a recipe (its `data`).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="`key=value`, and `out=FOLDER`.")] = None,
) -> None:
    """A table of few-shot heads, methods x shots x seeds: `methods=[gda,tip_x] shots=[1,4] adapter=RUN out=DIR`.

    What is compared: methods, shots, seeds, policy, transfer, adapter, views, views_mode, augment. Names: text,
    names, templates, logit_scale. Data: columns, shift, source, also, candidates, group, holdout, split_seed,
    lists, fewer, leaks, min_images, data, model, root. Running: size, device, precision, cache.
    `vicinal.fewshot.Settings` tells what each is.
    """
    from vicinal.fewshot import Settings
    from vicinal.fewshot import fewshot as run_table

    words = [word for word in overrides or [] if not word.startswith("out=")]
    out = next((w.removeprefix("out=") for w in overrides or [] if w.startswith("out=")), "fewshot")
    run_table(model, source, Settings.parse(words), out)


@app.command()
def overlap(
    model: Model,
    sources: Annotated[list[str], typer.Argument(help="Labelled folders or tables that it was not trained on.")],
    before: Annotated[
        str | None, typer.Option(help="The model without the adapter; of a run: what it began with.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("overlap"),
    size: Annotated[int | None, typer.Option(help="Input size in pixels of the model before.")] = None,
    device: str = "auto",
) -> None:
    """How much images of one class and of several overlap, before and after an adapter, with a picture."""
    from vicinal.overlap import measure_overlap

    print(measure_overlap(model, sources, out, before=before, size=size, device=device) / "overlap.png")


@app.command()
def schema(out: Annotated[Path | None, typer.Option(help="A file; else it is printed.")] = None) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from vicinal.recipe import json_schema

    text = json.dumps(json_schema(), indent=1)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def _told(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Our own warnings as a line to read; those of others with the place in the code that they are about."""
    if filename.startswith(str(Path(__file__).parent)):
        return f"vicinal: {message}\n"
    return _with_place(message, category, filename, lineno, line)


def _pairs(words: list[str] | None) -> dict[str, str]:
    pairs: dict[str, Any] = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--column {word!r}: write NAME=COLUMN, for instance label=brand")
        pairs[key] = value
    return pairs


def _whole(word: str) -> int:
    value = yaml.safe_load(word)
    if not isinstance(value, int):
        raise InputError(f"--k takes whole numbers; {word!r} is none")
    return value
