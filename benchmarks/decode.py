"""JPEG file to normalised 224-pixel tensor: vicinal against open_clip's pipeline (Pillow), one thread.

    VICINAL_DATA=… python benchmarks/decode.py

Photos of `grocery`: as they are (most are 224 x 224), and enlarged to 400 x 400, 1600 x 1200 and 4000 x 3000. Both
sides take turns, image by image, in one process, in CPU time of its one thread; a round is all images once; the ratio
is the median over rounds, its interval a bootstrap over rounds.

The cosine is between the embeddings of both tensors by ViT-Tiny/16: mean, share of photos that reach 0.9998, least.
Beside it stands what rounding to bytes does to the same photos: the least cosine between open_clip's tensor and that of
the same full decode, resized in floats and never rounded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vicinal.data.images import decode
from vicinal.data.transforms import eval_transform
from vicinal.types import Preprocess

MEAN = STD = (0.5, 0.5, 0.5)  # what the ViT-Tiny weights take
CASES = {"as they are": None, "400 x 400": (400, 400), "1600 x 1200": (1600, 1200), "4000 x 3000": (4000, 3000)}


def interval(ratios: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def enlarged(files: list[Path], size: tuple[int, int], folder: Path) -> list[Path]:
    """Copies of that size; portrait photos stay portrait."""
    copies = []
    for i, file in enumerate(files):
        with Image.open(file) as photo:
            target = size if photo.width >= photo.height else size[::-1]
            copy = photo.convert("RGB").resize(target, Image.Resampling.BICUBIC)
        copies.append(folder / f"{size[0]}-{i}.jpg")
        copy.save(copies[-1], quality=90)
    return copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    import timm
    from open_clip.transform import image_transform
    from safetensors.torch import load_file

    data = Path(os.environ["VICINAL_DATA"])
    model = timm.create_model("vit_tiny_patch16_224")
    model.load_state_dict(load_file(data / "weights" / "vit_tiny_patch16_224.safetensors"))
    model.reset_classifier(0)
    model.eval()

    transform = eval_transform(Preprocess((224, 224), MEAN, STD))
    theirs_transform = image_transform(224, is_train=False, mean=MEAN, std=STD)

    def ours(file: Path) -> Tensor:
        return transform.view(decode(file, at_least=transform.at_least))

    def theirs(file: Path) -> Tensor:
        with Image.open(file) as image:
            return theirs_transform(image)

    def unrounded(file: Path) -> Tensor:
        cutout = decode(file)
        high, wide = cutout.size
        fit = (224, int(224 * wide / high)) if high <= wide else (int(224 * high / wide), 224)
        resized = torch.nn.functional.interpolate(cutout.pixels[None].float(), fit, mode="bicubic", antialias=True)[0]
        top, left = round((fit[0] - 224) / 2), round((fit[1] - 224) / 2)
        return resized[:, top : top + 224, left : left + 224].clamp(0, 255) / (255 * STD[0]) - MEAN[0] / STD[0]

    @torch.no_grad()
    def embedded(views: list[Tensor]) -> Tensor:
        return torch.nn.functional.normalize(model(torch.stack(views)), dim=-1)

    every = sorted((data / "grocery" / "images").rglob("*.jpg"))
    files = every[:: len(every) // arguments.images][: arguments.images]
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"{len(files)} photos, {arguments.rounds} rounds, torch {torch.__version__}, {cpu}")
    print("photos           open_clip     vicinal  ratio                  mean  >= .9998    least    bytes")
    with tempfile.TemporaryDirectory() as folder:
        for name, size in CASES.items():
            photos = files if size is None else enlarged(files, size, Path(folder))
            times = np.zeros((arguments.rounds + 1, 2))
            for times_of_round in times:
                for i, photo in enumerate(photos):
                    for side in (0, 1) if i % 2 else (1, 0):
                        start = time.thread_time()
                        (theirs, ours)[side](photo)
                        times_of_round[side] += time.thread_time() - start
            times = times[1:] / len(photos) * 1e3  # the first round warms up
            ratio, low, high = interval(times[:, 0] / times[:, 1])
            reference = [theirs(photo) for photo in photos]
            expected = embedded(reference)
            cosine = (expected * embedded([ours(photo) for photo in photos])).sum(1)
            rounding = (expected * embedded([unrounded(photo) for photo in photos])).sum(1)
            spent = "".join(f"{value:9.3f} ms" for value in np.median(times, axis=0))
            print(
                f"{name:14}{spent}  {f'{ratio:.2f} [{low:.2f}, {high:.2f}]':18}{cosine.mean():9.5f}"
                f"{(cosine >= 0.9998).float().mean():10.0%}{cosine.min():9.5f}{rounding.min():9.5f}"
            )


if __name__ == "__main__":
    main()
