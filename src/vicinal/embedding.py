"""Manifest + Encoder -> Embeddings: the hinge between images and everything that is measured.

Vectors are kept by content: a row's key is the hash of its file's bytes, its box and padding; a store belongs to one
model (weights, preprocessing, precision). So a baseline, a second run, another split or a copied folder costs nothing.

Letters: N images, D numbers an embedding.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from vicinal.data.images import Cutout, read_bytes
from vicinal.data.loader import EvalBatches, eval_batches
from vicinal.data.manifest import Manifest
from vicinal.data.transforms import Augment, EvalTransform, TrainTransform, eval_transform, train_transform
from vicinal.models.encoder import Encoder
from vicinal.models.modules import plain_attention
from vicinal.types import Embeddings, InputError

__all__ = [
    "NothingReadableError",
    "Precision",
    "autocast_dtype",
    "choose_precision",
    "default_cache",
    "embed",
    "embed_classes",
    "embed_cutouts",
    "embed_text",
    "embed_views",
    "pick_device",
]

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class NothingReadableError(InputError):
    """Not one image of a manifest could be read."""


def pick_device(name: str = "auto") -> torch.device:
    """The device to compute on: "auto" takes CUDA, else Apple's MPS, else the CPU.

    Raises:
        InputError: the device named is not there.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} is not available here ({error}); use device=auto or device=cpu") from error
    return device


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """What "auto" means on this device: bf16 where it is in the hardware, fp16 on other GPUs, else fp32.

    On a CPU, bf16 done in software is slower than fp32, so it takes AVX-512 bf16, AMX, or an Arm CPU with bf16.

    Raises:
        InputError: fp16 without a GPU, where it is slow and has no loss scaler.

    >>> choose_precision("fp32", torch.device("cpu"))
    'fp32'
    """
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"precision: fp16 needs a GPU, and this is {device.type}; use auto")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    if torch.backends.cpu.get_cpu_capability().startswith("SVE"):  # Arm
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type of the matrix products under `precision`, None for float32.

    >>> autocast_dtype("bf16", torch.device("cpu"))
    torch.bfloat16
    """
    chosen = choose_precision(precision, device)
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]


def default_cache() -> Path:
    """Where embeddings are kept: $VICINAL_CACHE, else the user's cache folder."""
    return Path(os.environ.get("VICINAL_CACHE") or "~/.cache/vicinal").expanduser() / "embeddings"


def embed(
    encoder: Encoder,
    manifest: Manifest,
    *,
    batch_size: int = 128,
    cache: str | Path | None = None,
    workers: int | None = None,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    on_error: Literal["raise", "skip"] = "raise",
    progress: Callable[[int, int], None] | None = None,
) -> Embeddings:
    """Embed every image of a manifest: evaluation transform, encoder in eval mode, rows scaled to length 1.

    Args:
        encoder: left on the device and in the mode it came in.
        manifest: its rows; an unlabelled one gets the label 0 of no classes.
        batch_size: images at a time; memory grows with it, results do not depend on it beyond rounding.
        cache: a folder of kept vectors (see `default_cache`), or None to compute all.
        workers: processes that decode; None chooses by the machine.
        device: "auto", "cpu", "cuda:0", …
        precision: of the encoder's arithmetic; vectors are stored in float32.
        on_error: an unreadable image stops with its name ("raise"), or its row is left out ("skip").
        progress: called with (images done, images to do).

    Returns:
        One row for each readable image, in the manifest's order. `ids` tells which.

    Raises:
        InputError: an image is missing or cannot be read, and `on_error` is "raise".
        NothingReadableError: nothing is left after skipping.
    """
    transform = eval_transform(encoder.preprocess)
    found = _gather(encoder, manifest, transform, "", batch_size, cache, workers, device, precision, on_error, progress)
    rows = sorted(found)
    if not rows:
        raise NothingReadableError("no image of the manifest could be read; `vicinal check` lists the reasons")
    vectors = torch.stack([found[i] for i in rows])
    ids = manifest.ids()
    return Embeddings(vectors, manifest.labels()[rows], tuple(ids[i] for i in rows), manifest.classes)


def embed_views(
    encoder: Encoder,
    manifest: Manifest,
    *,
    views: int,
    augment: str | Augment = "standard",
    seed: int = 0,
    batch_size: int = 128,
    cache: str | Path | None = None,
    workers: int | None = None,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "N V D"]:
    """Embed V random views of every image, as few-shot heads take them; vectors keep the length the encoder gives.

    View v of an image is a function of its pixels, `seed` and v, and of nothing else: not of its row, nor of what is
    embedded with it. So it is cached as an image is, and more views leave the first ones as they were.

    Args:
        encoder: left on the device and in the mode it came in.
        manifest: N rows.
        views: V. The published few-shot heads: 10.
        augment: how a view differs; a name in `vicinal.data.transforms.AUGMENT`. The published ones: random crops of
            half the area or more, mirrored half of the time ("mirrored"). Default: the same, not mirrored.
        seed: of the views.
        batch_size: as in `embed`.
        cache: as in `embed`.
        workers: as in `embed`.
        device: as in `embed`.
        precision: as in `embed`.
        progress: called with (views done, views to do).

    Raises:
        InputError: fewer than one view, an unknown augmentation, or an image that cannot be read.
    """
    if views < 1:
        raise InputError(f"views={views}: an image has at least 1 view")
    chosen = train_transform(encoder.preprocess, augment)
    parts = []
    for view in range(views):
        transform = _SeededView(chosen, seed, view)
        note = f"{chosen.augment} {seed} {view}"

        def told(done: int, total: int, before: int = view) -> None:
            if progress:
                progress(before * total + done, views * total)

        found = _gather(
            encoder, manifest, transform, note, batch_size, cache, workers, device, precision, "raise", told
        )
        parts.append(torch.stack([found[i] for i in range(len(manifest))]))
    return torch.stack(parts, dim=1)


@dataclass(frozen=True, slots=True)
class _SeededView:
    """A random view whose randomness comes from the picture itself, `seed` and `view`."""

    transform: TrainTransform
    seed: int
    view: int

    def __call__(self, image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "3 h w"]:
        digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=8, key=f"{self.seed} {self.view}".encode())
        torch.default_generator.manual_seed(int.from_bytes(digest.digest(), "little"))  # of a worker, or forked
        return self.transform(image)


def _gather(
    encoder: Encoder,
    manifest: Manifest,
    transform: EvalTransform | _SeededView,
    note: str,
    batch_size: int,
    cache: str | Path | None,
    workers: int | None,
    device: str | torch.device,
    precision: Precision,
    on_error: Literal["raise", "skip"],
    progress: Callable[[int, int], None] | None,
) -> dict[int, Tensor]:
    """Row -> vector, kept or computed; unit rows of the evaluation view, raw ones of views (`note` says which)."""
    target = pick_device(str(device))
    dtype = autocast_dtype(precision, target)
    store = _Store(Path(cache).expanduser(), _model_key(encoder, dtype, note)) if cache is not None else None
    keys = _row_keys(manifest, on_error) if store else [None] * len(manifest)
    known = store.read() if store else {}
    missing = [i for i, key in enumerate(keys) if key is None or key not in known]

    fresh: dict[int, Tensor] = {}
    if missing:
        mask = torch.zeros(len(manifest), dtype=torch.bool)
        mask[missing] = True
        batches = eval_batches(
            manifest.where(mask), transform, batch_size=batch_size, workers=workers, on_error=on_error
        )
        try:
            _compute(encoder, batches, missing, fresh, target, dtype, not note, progress)
        finally:  # an interrupted run keeps what it has paid for
            if store and fresh:
                kept = {key: vector for i, vector in fresh.items() if (key := keys[i]) is not None}
                store.add(kept)
    return {i: fresh[i] if i in fresh else known[key or ""] for i, key in enumerate(keys) if i in fresh or key in known}


def _compute(
    encoder: Encoder,
    batches: EvalBatches,
    rows: Sequence[int],
    fresh: dict[int, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    unit: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fill `fresh` (row in the caller's manifest -> vector), batch by batch."""
    was_training, came_from = encoder.training, next(encoder.parameters()).device
    encoder.eval().to(device)
    done = 0
    try:
        with plain_attention(encoder, device.type == "cpu" and dtype == torch.bfloat16):
            for batch in batches:
                images = batch["image"].to(device, non_blocking=True)
                vectors = _encode(encoder, images, dtype, unit)
                fresh.update(zip((rows[i] for i in batch["index"].tolist()), vectors, strict=True))
                done += len(images)
                if progress:
                    progress(done, len(rows))
    finally:
        encoder.train(was_training).to(came_from)


def embed_cutouts(
    encoder: Encoder,
    cutouts: Iterable[Cutout],
    *,
    batch_size: int = 128,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
) -> Float[Tensor, "N D"]:
    """Embed pictures that are in memory: what `embed` gives for the same pixels, up to rounding.

    Args:
        encoder: left on the device and in the mode it came in.
        cutouts: N of them, taken `batch_size` at a time; see `data.images.decode` and `Cutout.whole`.
        batch_size: how many are held, resized, at once.
        device: "auto", "cpu", "cuda:0", …
        precision: of the encoder's arithmetic; vectors are float32.
    """
    target = pick_device(str(device))
    dtype = autocast_dtype(precision, target)
    view = eval_transform(encoder.preprocess).view
    was_training, came_from = encoder.training, next(encoder.parameters()).device
    encoder.eval().to(target)
    parts, left = [torch.zeros(0, encoder.embedding_dim)], iter(cutouts)
    try:
        with plain_attention(encoder, target.type == "cpu" and dtype == torch.bfloat16):
            while batch := [view(cutout) for cutout in islice(left, batch_size)]:
                images = torch.stack(batch).contiguous(memory_format=torch.channels_last)
                parts.append(_encode(encoder, images.to(target), dtype))
    finally:
        encoder.train(was_training).to(came_from)
    return torch.cat(parts)


@torch.inference_mode()
def _encode(
    encoder: Encoder, images: Float[Tensor, "B 3 H W"], dtype: torch.dtype | None, unit: bool = True
) -> Float[Tensor, "B D"]:
    with torch.autocast(images.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        vectors = encoder.encode_image(images).float()
    return (F.normalize(vectors, dim=-1) if unit else vectors).cpu()


def embed_text(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
) -> Float[Tensor, "N D"]:
    """Embed texts: tokenizer, text tower in eval mode, rows scaled to length 1. Equal texts are embedded once.

    Args:
        encoder: left on the device and in the mode it came in.
        texts: N of them; what is longer than the encoder's `context_length` is cut.
        batch_size: texts at a time.
        device: "auto", "cpu", "cuda:0", …
        precision: of the encoder's arithmetic; vectors are float32.

    Raises:
        InputError: the encoder has no text tower, or a LinearHead has moved the images away from the texts.
    """
    target = pick_device(str(device))
    dtype = autocast_dtype(precision, target)
    distinct = list(dict.fromkeys(texts))
    was_training, came_from = encoder.training, next(encoder.parameters()).device
    encoder.eval().to(target)
    try:
        parts = []
        with torch.inference_mode():
            for at in range(0, len(distinct), batch_size):
                with torch.autocast(target.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    vectors = encoder.encode_text(distinct[at : at + batch_size])
                parts.append(F.normalize(vectors.float(), dim=-1).cpu())
    finally:
        encoder.train(was_training).to(came_from)
    place = {text: i for i, text in enumerate(distinct)}
    rows = torch.cat(parts) if parts else torch.zeros(0, encoder.embedding_dim)
    return rows[[place[text] for text in texts]].clone()


def embed_classes(
    encoder: Encoder,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
) -> Float[Tensor, "C D"]:
    """A vector for each class from its name: the mean over templates of unit text embeddings, scaled to length 1.

        w_c = u / |u|,  u = sum_t text(t(name_c)) / |text(t(name_c))|

    Radford et al. 2021 (CLIP, arXiv:2103.00020), section 3.1.4.

    Args:
        encoder: with a text tower.
        names: C classes, as a person would write them.
        templates: sentences with `{}` where the name goes.
        device: "auto", "cpu", "cuda:0", …
        precision: of the encoder's arithmetic; vectors are float32.

    Raises:
        InputError: a template without `{}`, or none; the encoder has no text tower.
    """
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise InputError(
            f"templates: write {{}} once where the class name goes; wrong: {wrong[0] if wrong else 'none'}"
        )
    texts = [template.replace("{}", name) for name in names for template in templates]
    vectors = embed_text(encoder, texts, device=device, precision=precision)
    return F.normalize(vectors.view(len(names), len(templates), -1).mean(1), dim=-1)


# --------------------------------------------------------------------------------------------------- kept vectors


def _model_key(encoder: Encoder, dtype: torch.dtype | None, note: str) -> str:
    text = f"{encoder.fingerprint()} {encoder.preprocess} {dtype}{note and ' ' + note}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _row_keys(manifest: Manifest, on_error: str) -> list[str | None]:
    """One key a row; None for a file that cannot be read (the loader then says so, or skips it)."""
    paths = [manifest.path(i) for i in range(len(manifest))]
    distinct = list(dict.fromkeys(paths))

    def digest(path: Path) -> str | None:
        try:
            return hashlib.sha256(read_bytes(path)).hexdigest()
        except InputError:
            return None

    with ThreadPoolExecutor(8) as pool:
        by_path = dict(zip(distinct, pool.map(digest, distinct, chunksize=64), strict=True))
    boxes = manifest.column("box") if "box" in manifest.names() else [None] * len(manifest)

    def key(path: Path, box: Sequence[float] | None) -> str | None:
        content = by_path[path]
        return content if box is None or content is None else f"{content} {list(box)} {manifest.padding}"

    return [key(path, box) for path, box in zip(paths, boxes, strict=True)]


class _Store:
    """The kept vectors of one model: a folder of safetensors files that are only ever added to."""

    def __init__(self, cache: Path, model_key: str) -> None:
        self.folder = cache / model_key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cache: embeddings cannot be kept in {cache}: {error}; choose another folder, or cache: null"
            ) from error

    def read(self) -> dict[str, Tensor]:
        """All keys and their vectors; a file cut short by a killed process is passed over."""
        from safetensors import SafetensorError, safe_open

        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(str(path), framework="pt") as file:
                    keys = json.loads(file.metadata()["keys"])
                    found.update(zip(keys, file.get_tensor("vectors"), strict=True))
            except (OSError, SafetensorError, KeyError, ValueError):
                continue
        return found

    def add(self, rows: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        keys = json.dumps(list(rows))
        name = hashlib.sha256(keys.encode()).hexdigest()[:32]
        part = self.folder / f"{name}.{os.getpid()}.part"
        save_file({"vectors": torch.stack(list(rows.values()))}, part, {"keys": keys})
        part.replace(self.folder / f"{name}.safetensors")
