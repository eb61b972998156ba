r"""A small DETR for logos, trained on one CPU core: what stands before a matcher where boxes are not given.

    python benchmarks/detector.py $VICINAL_DATA/logo_scenes --division division.json --out runs/detector \
        --weights $VICINAL_DATA/weights/vit_tiny_patch16_224.safetensors

Deformable DETR of transformers (Zhu et al. 2021, 2010.04159), two stages, with the first eight blocks of a ViT-Tiny as
its backbone, and one class, "logo". The division is {"pictures": {"train": [names], "test": [...], ...}}. Training
scenes are cropped, mirrored and recoloured, and logos of other training scenes are pasted on them, turned. Run again
with the same folder, it goes on where it stopped; the finished model lies in OUT/model. `--measure PART` then says
recall and precision at IoU .5 on a part of the division.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.ops import box_iou, generalized_box_iou, generalized_box_iou_loss, nms, sigmoid_focal_loss

from vicinal.data.voc import read_voc

MEAN = STD = 0.5  # of the ViT-Tiny
ON = 0.6  # from which IoU on a query is responsible for a logo
OVERLAP = 0.5  # of answers, beyond which the better one stays

Target = dict[str, torch.Tensor]


class Scene:
    """A picture in memory, its boxes in pixels (x0, y0, x1, y1)."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        with Image.open(root / name) as picture:
            self.pixels = picture.convert("RGB")
        self.boxes: list[tuple[float, float, float, float]] = []


def read_scenes(root: Path) -> list[Scene]:
    manifest = read_voc(root)
    scenes: dict[str, Scene] = {}
    for image, box in zip(manifest.column("image"), manifest.column("box"), strict=True):
        if image not in scenes:
            scenes[image] = Scene(root, image)
        scenes[image].boxes.append(tuple(box))
    return list(scenes.values())


# ---- augmentation


def cut_out(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A logo of the scene: the middle of one box, turned, transparent around it."""
    x0, y0, x1, y1 = scene.boxes[rng.integers(len(scene.boxes))]
    inset = 0.08
    w, h = x1 - x0, y1 - y0
    patch = scene.pixels.crop((int(x0 + inset * w), int(y0 + inset * h), int(x1 - inset * w), int(y1 - inset * h)))
    side = rng.uniform(24, 190)
    long = max(patch.size)
    stretch = math.exp(rng.normal(0, 0.15))
    size = (max(8, int(patch.width * side / long * stretch)), max(8, int(patch.height * side / long / stretch)))
    patch = patch.resize(size, Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:
        patch = Image.fromarray(np.asarray(patch)[..., rng.permutation(3)])
    patch.putalpha(255)
    return patch.rotate(rng.uniform(-18, 18), Image.Resampling.BILINEAR, expand=True)


def augmented(
    scene: Scene, others: list[Scene], rng: np.random.Generator, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One training example: pixels "3 S S" in 0 .. 255 and boxes "n 4" as centre and size, in parts of the side."""
    picture, boxes = scene.pixels.copy(), [np.array(b) for b in scene.boxes]
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.35, 0.35, 0.2, 0.1])):
        logo = cut_out(others[rng.integers(len(others))], rng)
        if logo.width >= picture.width or logo.height >= picture.height:
            continue
        x, y = rng.integers(picture.width - logo.width + 1), rng.integers(picture.height - logo.height + 1)
        new = np.array([x, y, x + logo.width, y + logo.height], float)
        if any(covered(b, new) > 0.3 for b in boxes):
            continue
        picture.paste(logo, (int(x), int(y)), logo)
        boxes.append(new)
    w, h = picture.size
    if rng.random() < 0.7:
        scale = rng.uniform(0.55, 1.0)
        stretch = math.exp(rng.uniform(-0.2, 0.2))
        cw, ch = min(w, scale * w * stretch), min(h, scale * h / stretch)
        x, y = rng.uniform(0, w - cw), rng.uniform(0, h - ch)
    else:
        x, y, cw, ch = 0.0, 0.0, float(w), float(h)
    picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + cw, y + ch))
    window = np.array([x, y, x + cw, y + ch])
    kept = [b for b in boxes if covered(b, window) > 0.5]
    found = torch.tensor(np.array(kept).reshape(-1, 4), dtype=torch.float32)
    found = ((found - torch.tensor([x, y, x, y])) / torch.tensor([cw, ch, cw, ch])).clamp(0, 1)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    if rng.random() < 0.5:
        pixels = pixels.flip(2)
        found = torch.stack([1 - found[:, 2], found[:, 1], 1 - found[:, 0], found[:, 3]], 1)
    gain = torch.tensor(rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, 3), dtype=torch.float32)
    pixels = ((pixels - 128) * rng.uniform(0.75, 1.25) + 128) * gain[:, None, None]
    centre = torch.cat([(found[:, :2] + found[:, 2:]) / 2, found[:, 2:] - found[:, :2]], 1)
    return pixels.clamp(0, 255), centre


def covered(box: np.ndarray, by: np.ndarray) -> float:
    """The share of `box` that lies in `by`."""
    w, h = min(box[2], by[2]) - max(box[0], by[0]), min(box[3], by[3]) - max(box[1], by[1])
    return max(0.0, w) * max(0.0, h) / ((box[2] - box[0]) * (box[3] - box[1]))


def batch_of(scenes: list[Scene], rng: np.random.Generator, count: int, size: int) -> tuple[torch.Tensor, list[Target]]:
    examples = [augmented(scenes[i], scenes, rng, size) for i in rng.integers(len(scenes), size=count)]
    pixels = torch.stack([x for x, _ in examples]).div_(255).sub_(MEAN).div_(STD)
    return pixels, [{"class_labels": torch.zeros(len(b), dtype=torch.long), "boxes": b} for _, b in examples]


# ---- models


def build(weights: Path, size: int) -> torch.nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, VitDetConfig

    backbone = VitDetConfig(
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=3,
        image_size=size,
        pretrain_image_size=224,
        patch_size=16,
        use_absolute_position_embeddings=True,
        out_features=["stage8"],
        drop_path_rate=0.0,
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=128,
        encoder_layers=1,
        decoder_layers=3,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_feature_levels=1,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=20,
        num_queries=20,
        auxiliary_loss=True,
        dropout=0.0,
        id2label={0: "logo"},
        label2id={"logo": 0},
    )
    model = DeformableDetrForObjectDetection(config)
    for layer in model.bbox_embed:  # boxes begin where they are proposed, and proposals at a third of the side
        torch.nn.init.zeros_(layer.layers[-1].weight)
        torch.nn.init.zeros_(layer.layers[-1].bias)
    torch.nn.init.constant_(model.bbox_embed[-1].layers[-1].bias[2:], math.log(0.3 / 0.7) - math.log(0.05 / 0.95))
    for layer in model.class_embed:
        torch.nn.init.constant_(layer.bias, -2.0)
    vit = next(module for module in model.modules() if type(module).__name__ == "VitDetBackbone")
    given, state = load_file(weights), dict(vit.state_dict())
    names = {
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.projection.bias": "patch_embed.proj.bias",
    }
    for i, kind in product(range(8), ("weight", "bias")):
        for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            names[f"encoder.layer.{i}.{part}.{kind}"] = f"blocks.{i}.{part}.{kind}"
        for part in ("qkv", "proj"):
            names[f"encoder.layer.{i}.attention.{part}.{kind}"] = f"blocks.{i}.attn.{part}.{kind}"
    state.update({mine: given[theirs] for mine, theirs in names.items()})
    vit.load_state_dict(state)
    vit.embeddings.requires_grad_(False)
    vit.encoder.layer[:3].requires_grad_(False)  # edges are edges: a quarter of the time saved
    return model


# ---- training and measuring


def losses(model: torch.nn.Module, pixels: torch.Tensor, labels: list[Target]) -> dict[str, torch.Tensor]:
    """Focal loss, L1 and generalised IoU on every layer of the decoder, and on the proposals, weighted as in the paper.

    What a query is responsible for is decided by overlap, not one to one: every query whose box is on a logo by an IoU
    of ON, and the best of each logo; overlapping answers are thinned afterwards (DETA, Ouyang-Zhang et al. 2022,
    2212.06137). To learn which one of several alike should speak takes a DETR most of its hundreds of epochs.
    """
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pixel_values=pixels, labels=labels)
    layers = [(out.logits, out.pred_boxes), *((o["logits"], o["pred_boxes"]) for o in out.auxiliary_outputs)]
    layers.append((out.enc_outputs_class, out.enc_outputs_coord_logits.float().sigmoid()))
    found = [layer_losses(logits.float()[..., 0], boxes.float(), labels) for logits, boxes in layers]
    total = sum(2 * one["class"] + 5 * one["box"] + 2 * one["giou"] for one in found)
    return {"loss": total, **found[0], **{f"{name}_proposed": value for name, value in found[-1].items()}}


def layer_losses(logits: torch.Tensor, boxes: torch.Tensor, labels: list[Target]) -> dict[str, torch.Tensor]:
    """Of "B Q" logits and "B Q 4" boxes as centre and size."""
    target = torch.zeros_like(logits)
    predicted, wanted = [], []
    corners = corners_of(boxes)
    for i, label in enumerate(labels):
        if not len(label["boxes"]):
            continue
        with torch.no_grad():
            iou = generalized_box_iou(corners[i], corners_of(label["boxes"]))
            best, of = box_iou(corners[i], corners_of(label["boxes"])).max(1)
            responsible = best >= ON
            first = iou.argmax(0)
            responsible[first], of[first] = True, torch.arange(len(first))
            rows = responsible.nonzero().flatten()
        target[i, rows] = 1.0
        predicted.append(boxes[i, rows])
        wanted.append(label["boxes"][of[rows]])
    count = max(1.0, float(target.sum()))
    found = {"class": sigmoid_focal_loss(logits, target, reduction="sum") / count}
    if not predicted:
        return {**found, "box": 0 * boxes.sum(), "giou": 0 * boxes.sum()}
    mine, theirs = torch.cat(predicted), torch.cat(wanted)
    giou = generalized_box_iou_loss(corners_of(mine), corners_of(theirs), reduction="sum")
    return {**found, "box": (mine - theirs).abs().sum() / count, "giou": giou / count}


def corners_of(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def found_in(model: torch.nn.Module, scenes: list[Scene], size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Boxes in pixels "n 4" and scores of every scene, thinned where they overlap."""
    model.eval()
    found = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(scenes), 32):
            part = scenes[start : start + 32]
            pixels = [np.array(s.pixels.resize((size, size), Image.Resampling.BILINEAR)) for s in part]
            x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD)
            out = model(pixel_values=x)
            logits, boxes = out.logits.float(), out.pred_boxes.float()
            scores = logits.softmax(-1)[..., 0] if logits.shape[-1] == 2 else logits.sigmoid()[..., 0]
            corners = corners_of(boxes)
            sides = torch.tensor([[*s.pixels.size, *s.pixels.size] for s in part], dtype=torch.float32)
            for box, score in zip(corners * sides[:, None], scores, strict=True):
                keep = nms(box, score, OVERLAP)
                found.append((box[keep], score[keep]))
    return found


def recall_precision(
    found: list[tuple[torch.Tensor, torch.Tensor]], scenes: list[Scene], threshold: float
) -> dict[str, float]:
    """Greedy one-to-one matching by score at IoU .5."""
    hits = total = answers = 0
    for (boxes, scores), scene in zip(found, scenes, strict=True):
        keep = scores >= threshold
        boxes, scores = boxes[keep], scores[keep]
        iou = box_iou(boxes, torch.tensor(scene.boxes, dtype=torch.float32))
        taken: set[int] = set()
        for i in scores.argsort(descending=True).tolist():
            free = [(float(iou[i, j]), j) for j in range(len(scene.boxes)) if j not in taken]
            if free and max(free)[0] >= 0.5:
                taken.add(max(free)[1])
        hits, total, answers = hits + len(taken), total + len(scene.boxes), answers + len(scores)
    return {"recall": hits / total, "precision": hits / max(answers, 1), "boxes": total, "answers": answers}


def train(model: torch.nn.Module, training: list[Scene], a: argparse.Namespace) -> int:
    """Steps until they are done or the minutes are over; the step reached."""
    rng = np.random.default_rng(a.seed)
    held = set(rng.permutation(len(training))[: len(training) // 20].tolist())  # to look at while training
    looked_at = [s for i, s in enumerate(training) if i in held]
    training = [s for i, s in enumerate(training) if i not in held]
    head = [p for n, p in model.named_parameters() if not n.startswith("model.backbone")]
    body = [p for n, p in model.named_parameters() if n.startswith("model.backbone") and p.requires_grad]
    groups = [{"params": head, "lr": a.head_lr}, {"params": body, "lr": a.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    warm = max(1, a.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / warm) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1, t / a.steps))) / 2)
    )
    last, at = a.out / "last.pt", 0
    if last.exists():
        state = torch.load(last, weights_only=True)
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(state[name])
        at = state["step"]
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(training)} training scenes, {len(looked_at)} to look at, {size:,} parameters, step {at}")

    def save() -> None:
        part = last.with_suffix(".part")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save({**state, "step": at}, part)
        part.replace(last)

    begin = tick = time.perf_counter()
    sums: Counter[str] = Counter()
    while at < a.steps and time.perf_counter() - begin < a.minutes * 60:
        model.train()
        found = losses(model, *batch_of(training, np.random.default_rng([a.seed, at]), a.batch, a.size))
        optimizer.zero_grad()
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        at += 1
        sums.update({name: float(value.detach()) for name, value in found.items()})
        if at % 50 == 0:
            spent, tick = time.perf_counter() - tick, time.perf_counter()
            shown = " ".join(f"{name} {value / 50:.3f}" for name, value in sums.items())
            print(at, shown, f"{spent / 50 / a.batch * 1000:.1f} ms an image", flush=True)
            sums.clear()
        if at % 250 == 0 or at == a.steps:
            save()
            print("held-out training scenes:", recall_precision(found_in(model, looked_at, a.size), looked_at, 0.5))
            tick = time.perf_counter()
    save()
    return at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--division", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--head-lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--minutes", type=float, default=11, help="Stop after as many; run again to go on.")
    parser.add_argument("--measure", help="A part of the division to measure the finished model on.")
    a = parser.parse_args()
    pictures = {part: set(names) for part, names in json.loads(a.division.read_text())["pictures"].items()}
    scenes = read_scenes(a.scenes)
    torch.manual_seed(a.seed)
    model = build(a.weights, a.size)
    a.out.mkdir(parents=True, exist_ok=True)
    reached = train(model, [s for s in scenes if s.name in pictures["train"]], a)
    if reached < a.steps:
        print(f"step {reached} of {a.steps}: run it again to go on")
        return
    from transformers import DeformableDetrImageProcessor

    model.save_pretrained(a.out / "model")
    DeformableDetrImageProcessor(
        size={"height": a.size, "width": a.size}, image_mean=[MEAN] * 3, image_std=[STD] * 3, do_pad=False
    ).save_pretrained(a.out / "model")
    if a.measure:
        asked = [s for s in scenes if s.name in pictures[a.measure]]
        found = found_in(model, asked, a.size)
        for threshold in (0.3, 0.5, 0.7):
            shown = {k: round(v, 3) for k, v in recall_precision(found, asked, threshold).items()}
            print(f"{a.measure}, {len(asked)} scenes, boxes scored {threshold} or more: {shown}")


if __name__ == "__main__":
    main()
