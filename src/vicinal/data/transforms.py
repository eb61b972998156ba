"""Bytes to what a backbone sees: the evaluation transform it was trained with, and random views for training.

Geometry is done on bytes (torchvision's antialiased resize has a fast path for them), colour and normalisation on
floats, in one multiply-add:

    out = x a + b,  a = 1 / (255 std),  b = -mean / std

Brightness, contrast, saturation and grey are linear in the pixels as well, so all of a colour jitter is one 3 x 3
matrix. Tensors are "3 h w" in shape and channels-last in memory, as the decoder wrote them: to turn them round costs
three times the normalisation, and the patch embedding of a ViT is 2.5 times faster (and bit-equal) on channels-last.

Letters: H, W height and width of the image, h, w those that the backbone takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from vicinal.data.images import Cutout
from vicinal.types import InputError, Preprocess

__all__ = [
    "AUGMENT",
    "Augment",
    "EvalTransform",
    "MultiCrop",
    "TrainTransform",
    "eval_transform",
    "multi_crop",
    "train_transform",
]

_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision weigh R, G, B


@dataclass(frozen=True, slots=True)
class Augment:
    """How a random view differs from the evaluation view. Every default is "not at all".

    Args:
        scale: smallest and largest share of the image's area that a random crop keeps; the crop is resized to the
            backbone's size. None: no crop, the view is fitted as in evaluation.
        ratio: narrowest and widest crop, width by height, relative to the backbone's own shape.
        flip: probability of mirroring left and right.
        rotate: largest angle, degrees, to either side.
        zoom: smallest and largest size of the picture within the frame.
        shift: largest displacement to either side, as a share of the frame. Whatever a rotation, zoom or shift
            uncovers repeats the picture's edge.
        brightness: the pixels are multiplied by 1 - brightness to 1 + brightness.
        contrast: their distance from the mean grey, likewise.
        saturation: their distance from their own grey, likewise.
        hue: largest turn of all colours about the grey axis, to either side, as a share of the whole circle.
        jitter: probability that brightness, contrast, saturation and hue are changed at all.
        grey: probability of losing all colour.
        blur: probability of a Gaussian blur, of a standard deviation from 0.1 to 2 pixels of a view of 224.
        solarise: probability that what is brighter than the middle is inverted.
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    solarise: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether it rotates, zooms or shifts."""
        return bool(self.rotate or self.shift or self.zoom != (1.0, 1.0))

    @property
    def colours(self) -> bool:
        """Whether it changes colours."""
        shifts = self.brightness or self.contrast or self.saturation or self.hue or self.grey
        return bool(shifts or self.blur or self.solarise)


AUGMENT: Final[Mapping[str, Augment]] = {
    # The evaluation view itself.
    "none": Augment(),
    # open_clip's training default: almost the evaluation view.
    "light": Augment(scale=(0.9, 1.0)),
    # Half of the picture or more. Not mirrored: packages, signs, characters and marks are not what they were then.
    "standard": Augment(scale=(0.5, 1.0)),
    # The same for animals, plants, garments, cars: what has no writing and no handedness.
    "mirrored": Augment(scale=(0.5, 1.0), flip=0.5),
    # What most networks were trained with on ImageNet, and those of the papers on cub200, cars196, sop, inshop too.
    "imagenet": Augment(scale=(0.08, 1.0), flip=0.5),
    # Icons, emoji, characters, marks: one idea in several hands, which differ most in colour and placing. Measured on
    # the development halves of two such data sets (docs/log.md).
    "drawing": Augment(rotate=15.0, zoom=(0.8, 1.2), shift=0.1, brightness=0.3, contrast=0.3, saturation=0.3, grey=0.5),
    # The logo system's own, which mirrors writing: kept to compare with. Strengths are ours: docs/decisions.md.
    "medium": Augment(
        flip=0.5, rotate=15.0, zoom=(0.9, 1.1), shift=0.1, brightness=0.2, contrast=0.2, saturation=0.2, grey=0.1
    ),
    # A mark fills its picture, so nothing is cut off; it comes in other colours, or in none.
    "logo": Augment(rotate=8.0, zoom=(0.8, 1.1), shift=0.05, brightness=0.2, contrast=0.2, saturation=0.2, grey=0.1),
    # The colours of DINO's views, and its mirroring; `multi_crop` cuts them out.
    "dino": Augment(
        scale=(0.4, 1.0),
        flip=0.5,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter=0.8,
        grey=0.2,
        blur=0.5,
    ),
}


@dataclass(frozen=True, slots=True)
class EvalTransform:
    """What the backbone was trained to evaluate on. See `eval_transform`."""

    preprocess: Preprocess

    @property
    def at_least(self) -> tuple[int, int]:
        """The size that the image is resized to before the crop: what a decoder must keep twice of."""
        return _before_crop(self.preprocess)

    def __call__(self, image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "3 h w"]:
        """The view of an image."""
        return self.view(Cutout.whole(image))

    def view(self, cutout: Cutout) -> Float[Tensor, "3 h w"]:
        """The view of an image that may have been decoded smaller."""
        return _normalised(_fitted(cutout, self.preprocess), self.preprocess)


@dataclass(frozen=True, slots=True)
class TrainTransform:
    """A random view. See `train_transform`."""

    preprocess: Preprocess
    augment: Augment

    @property
    def at_least(self) -> tuple[int, int]:
        """The size that a whole image is resized to (a small crop of it then still has about its pixels)."""
        return self.preprocess.size if self.augment.scale else _before_crop(self.preprocess)

    def __call__(self, image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "3 h w"]:
        """A random view of an image."""
        return self.view(Cutout.whole(image))

    def view(self, cutout: Cutout) -> Float[Tensor, "3 h w"]:
        """A random view of an image that may have been decoded smaller."""
        preprocess, augment = self.preprocess, self.augment
        if augment.scale:  # half a pixel more or less does not matter to a random crop
            view = _random_crop(cutout.rounded(), preprocess, augment.scale, augment.ratio)
        else:
            view = _fitted(cutout, preprocess)
        if augment.flip and torch.rand(()).item() < augment.flip:
            view = view.flip(-1)
        out = _recoloured(view, preprocess, augment) if augment.colours else _normalised(view, preprocess)
        return _moved(out, augment) if augment.moves else out


@dataclass(frozen=True, slots=True)
class MultiCrop:
    """Several random views of an image, in two sizes. See `multi_crop`."""

    large: tuple[TrainTransform, ...]
    small: tuple[TrainTransform, ...]

    @property
    def at_least(self) -> tuple[int, int]:
        """The size that a whole image is resized to."""
        return self.large[0].at_least

    def __call__(self, image: UInt8[Tensor, "3 H W"]) -> dict[str, Tensor]:
        """Random views of an image."""
        return self.view(Cutout.whole(image))

    def view(self, cutout: Cutout) -> dict[str, Tensor]:
        """Random views by their names: `views` "G 3 H W", `crops` "L 3 h w"; `image` is the first of the views."""
        views = torch.stack([transform.view(cutout) for transform in self.large])
        found = {"image": views[0], "views": views}
        if self.small:
            found["crops"] = torch.stack([transform.view(cutout) for transform in self.small])
        return found


def eval_transform(preprocess: Preprocess) -> EvalTransform:
    """The evaluation view of an image, as timm and open_clip make it (to one level in 255 a pixel).

    "crop" resizes so that the image covers size / crop_pct and cuts the centre; "pad" resizes so that it fits into
    size and fills the rest with the mean; "squash" resizes to size.

    >>> transform = eval_transform(Preprocess(size=(4, 4), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    >>> transform(torch.full((3, 8, 10), 255, dtype=torch.uint8)).unique()
    tensor([1.])
    """
    return EvalTransform(preprocess)


def train_transform(preprocess: Preprocess, augment: str | Augment = "standard") -> TrainTransform:
    """A random view of an image for training, drawn from torch's global generator (the loader seeds it for each item).

    Args:
        preprocess: of the backbone; the view has its size, mean and std.
        augment: a name in `AUGMENT`, or an `Augment` of your own.

    Raises:
        InputError: there is no such name.

    >>> transform = train_transform(Preprocess((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "light")
    >>> transform(torch.zeros(3, 20, 16, dtype=torch.uint8)).shape
    torch.Size([3, 8, 8])
    """
    if isinstance(augment, str):
        if augment not in AUGMENT:
            raise InputError(f"augment={augment!r} is unknown; choose one of {', '.join(AUGMENT)}")
        augment = AUGMENT[augment]
    return TrainTransform(preprocess, augment)


def multi_crop(
    preprocess: Preprocess,
    augment: str | Augment = "dino",
    *,
    large_scale: tuple[float, float] = (0.4, 1.0),
    small_crops: int = 8,
    small_scale: tuple[float, float] = (0.05, 0.4),
    small_size: tuple[int, int] | None = None,
) -> MultiCrop:
    """Two large random views of an image and several small ones, as DINO takes them. Caron et al. 2021.

    Colours, mirroring and moves are those of `augment`. Where it blurs, it does so as the paper does: the first large
    view always, the second one time in ten, and that one is solarised one time in five; small views as `augment` says.

    Args:
        preprocess: of the backbone; every view has its mean and std.
        augment: a name in `AUGMENT`, or an `Augment` of your own; its own scale is not used.
        large_scale: smallest and largest share of the area in a large view. DINO: .4 to 1 (.25 in the overlap adapter).
        small_crops: L, how many small views. DINO: 8; the overlap adapter: 10.
        small_scale: the share of the area in a small one. DINO: .05 to .4 (.25 in the overlap adapter).
        small_size: height and width of the small views. None: three sevenths of the backbone's (DINO's 96 of 224),
            rounded down to a multiple of 16.

    Raises:
        InputError: there is no such name, a scale is no range within 0 to 1, or a count is below 0.

    >>> crops = multi_crop(Preprocess((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), small_crops=3, small_size=(16, 16))
    >>> {name: tuple(view.shape) for name, view in crops(torch.zeros(3, 40, 50, dtype=torch.uint8)).items()}
    {'image': (3, 32, 32), 'views': (2, 3, 32, 32), 'crops': (3, 3, 16, 16)}
    """
    for name, (low, high) in (("large_scale", large_scale), ("small_scale", small_scale)):
        if not 0 < low <= high <= 1:
            raise InputError(f"{name} is the smallest and largest share of an image's area, not {low} and {high}")
    if small_crops < 0:
        raise InputError(f"small_crops must be 0 or more, not {small_crops}")
    base = train_transform(preprocess, augment).augment
    if small_size is None:
        small_size = (max(16, preprocess.size[0] * 3 // 7 // 16 * 16), max(16, preprocess.size[1] * 3 // 7 // 16 * 16))
    blurs, solarises = ((1.0, 0.1), (0.0, 0.2)) if base.blur else ((0.0, 0.0), (base.solarise, base.solarise))
    large = [
        replace(base, scale=large_scale, blur=blur, solarise=solarise)
        for blur, solarise in zip(blurs, solarises, strict=True)
    ]
    small = TrainTransform(replace(preprocess, size=small_size), replace(base, scale=small_scale))
    return MultiCrop(tuple(TrainTransform(preprocess, one) for one in large), (small,) * small_crops)


def _before_crop(preprocess: Preprocess) -> tuple[int, int]:
    height, width = preprocess.size
    if preprocess.crop != "crop":
        return height, width
    return math.floor(height / preprocess.crop_pct), math.floor(width / preprocess.crop_pct)


def _fitted(cutout: Cutout, preprocess: Preprocess) -> UInt8[Tensor, "3 a b"]:
    """The image in the backbone's size; smaller than that on one side where it is to be padded."""
    high, wide = cutout.size
    height, width = preprocess.size
    if preprocess.crop == "squash":
        return cutout.resized(preprocess.size, preprocess.interpolation)
    if preprocess.crop == "pad":
        share = min(height / high, width / wide)
        fit = (min(max(round(high * share), 1), height), min(max(round(wide * share), 1), width))
        return cutout.resized(fit, preprocess.interpolation)
    short_h, short_w = _before_crop(preprocess)
    if short_h == short_w:  # torchvision's Resize(int), which timm and open_clip use: the long side is rounded down
        fit = (short_h, int(short_w * wide / high)) if high <= wide else (int(short_h * high / wide), short_w)
    else:
        share = max(short_h / high, short_w / wide)
        fit = (max(round(high * share), height), max(round(wide * share), width))
    resized = cutout.resized(fit, preprocess.interpolation)
    top, left = round((fit[0] - height) / 2), round((fit[1] - width) / 2)
    return resized[:, top : top + height, left : left + width]


def _random_crop(
    image: UInt8[Tensor, "3 H W"], preprocess: Preprocess, scale: tuple[float, float], ratio: tuple[float, float]
) -> UInt8[Tensor, "3 h w"]:
    """RandomResizedCrop of torchvision: area uniform, shape log-uniform, ten tries; then the largest central crop."""
    high, wide = image.shape[1:]
    shape = preprocess.size[1] / preprocess.size[0]
    low, log_span = math.log(ratio[0]), math.log(ratio[1] / ratio[0])
    for area, log_ratio, down, across in torch.rand(10, 4).tolist():
        aspect = shape * math.exp(low + log_ratio * log_span)
        pixels = high * wide * (scale[0] + area * (scale[1] - scale[0]))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= high and 0 < w <= wide:
            top, left = int(down * (high - h + 1)), int(across * (wide - w + 1))
            break
    else:
        aspect = min(max(wide / high, shape * ratio[0]), shape * ratio[1])
        h, w = min(high, max(round(wide / aspect), 1)), min(wide, max(round(high * aspect), 1))
        top, left = (high - h) // 2, (wide - w) // 2
    # Copied, since the fast resize wants rows without gaps.
    cut = image[:, top : top + h, left : left + w].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return Cutout.whole(cut).resized(preprocess.size, preprocess.interpolation)


@functools.lru_cache(maxsize=256)  # widths differ from image to image where they are padded
def _rows(
    mean: tuple[float, float, float], std: tuple[float, float, float], width: int
) -> tuple[Float[Tensor, "w3"], Float[Tensor, "w3"]]:
    """Factor and summand of one row of pixels, R G B R G B …: long rows are what vector instructions like."""
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * s)).float().repeat(width), (-m / s).float().repeat(width)


def _normalised(view: UInt8[Tensor, "3 a b"], preprocess: Preprocess) -> Float[Tensor, "3 h w"]:
    factor, summand = _rows(preprocess.mean, preprocess.std, view.shape[2])
    values = view.permute(1, 2, 0).flatten(1).to(torch.float32).mul_(factor).add_(summand)
    return _framed(values.view(*view.shape[1:], 3), preprocess)


def _framed(values: Float[Tensor, "a b 3"], preprocess: Preprocess) -> Float[Tensor, "3 h w"]:
    """In the middle of the frame; around it zero, which is the mean."""
    if values.shape[:2] != preprocess.size:
        rows, columns = (full - part for full, part in zip(preprocess.size, values.shape, strict=False))
        values = F.pad(values, (0, 0, columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return values.permute(2, 0, 1)


def _around_one(amount: float, draw: float) -> float:
    return 1.0 + amount * (2.0 * draw - 1.0)


def _recoloured(view: UInt8[Tensor, "3 a b"], preprocess: Preprocess, augment: Augment) -> Float[Tensor, "3 h w"]:
    """Jitter and normalise: x -> clamp(M x + o), M = brightness contrast (saturation I + (1 - saturation) 1 luma^T)."""
    brightness, contrast, saturation, grey = torch.rand(4).tolist()
    bright, steep = _around_one(augment.brightness, brightness), _around_one(augment.contrast, contrast)
    vivid = _around_one(augment.saturation, saturation)
    turn = augment.hue * (2 * torch.rand(()).item() - 1) if augment.hue else 0.0
    if augment.jitter < 1 and torch.rand(()).item() >= augment.jitter:
        bright, steep, vivid, turn = 1.0, 1.0, 1.0, 0.0
    if grey < augment.grey:
        vivid, turn = 0.0, 0.0
    planes = view.to(torch.float32, memory_format=torch.contiguous_format)
    if turn:
        planes = torch.einsum("ij,jab->iab", _turned(turn), planes)
    own_grey = planes[0] * _LUMA[0] + planes[1] * _LUMA[1] + planes[2] * _LUMA[2]
    # Contrast is about it. numpy's sum, since torch's depends on the number of threads in the last digit.
    mean_grey = float(own_grey.numpy().mean())
    common = own_grey.mul_(bright * steep * (1 - vivid)).add_(bright * (1 - steep) * mean_grey)
    jittered = planes.mul_(bright * steep * vivid).add_(common).clamp_(0, 255)
    if augment.blur and torch.rand(()).item() < augment.blur:
        jittered = _blurred(jittered, (0.1 + 1.9 * torch.rand(()).item()) * min(preprocess.size) / 224)
    if augment.solarise and torch.rand(()).item() < augment.solarise:
        jittered = torch.where(jittered >= 128, 255 - jittered, jittered)
    for plane, mean, std in zip(jittered, preprocess.mean, preprocess.std, strict=True):
        plane.mul_(1 / (255 * std)).sub_(mean / std)
    return _framed(jittered.permute(1, 2, 0), preprocess)


def _turned(share: float) -> Float[Tensor, "3 3"]:
    """The matrix that turns colours about the grey axis (Rodrigues): sums of R, G and B stay, and greys do."""
    angle = 2 * math.pi * share
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    own, before, after = cos + (1 - cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    return torch.tensor([[own, before, after], [after, own, before], [before, after, own]])


def _blurred(planes: Float[Tensor, "3 a b"], sigma: float) -> Float[Tensor, "3 a b"]:
    """A Gaussian of this standard deviation, in pixels, along both axes; the edge is repeated outwards."""
    reach = min(max(1, math.ceil(3 * sigma)), min(planes.shape[1:]) - 1)
    if reach < 1:
        return planes
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    padded = F.pad(planes[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]


def _moved(values: Float[Tensor, "3 h w"], augment: Augment) -> Float[Tensor, "3 h w"]:
    turn, size, down, across = torch.rand(4).tolist()
    angle = math.radians(augment.rotate * (2 * turn - 1))
    zoom = augment.zoom[0] + size * (augment.zoom[1] - augment.zoom[0])
    high, wide = values.shape[1:]
    # grid_sample asks for the way back, from frame to picture, in units of half a side.
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    dy, dx = (2 * augment.shift * (2 * draw - 1) for draw in (down, across))
    y, x = ((torch.arange(n) * 2 + 1) / n - 1 for n in (high, wide))
    grid = torch.empty(1, high, wide, 2)
    torch.add((x * cos + dx)[None], (y * (-sin * high / wide))[:, None], out=grid[0, :, :, 0])
    torch.add((x * (sin * wide / high))[None], (y * cos + dy)[:, None], out=grid[0, :, :, 1])
    return F.grid_sample(values[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
