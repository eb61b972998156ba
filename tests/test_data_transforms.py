"""The evaluation view equals timm's and open_clip's own; random views keep their promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as torch_f
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vicinal.data import transforms
from vicinal.data.transforms import AUGMENT, Augment, eval_transform, multi_crop, train_transform
from vicinal.types import InputError, Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Blurred noise: structure at the scale of a few pixels, as in a photo."""
    rng = np.random.default_rng([height, width, seed])
    small = rng.integers(0, 256, (max(height // 4, 1), max(width // 4, 1), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def levels(a: Tensor, b: Tensor, std: tuple[float, ...]) -> Tensor:
    """How far apart two normalised views are, in levels of 255."""
    return ((a - b) * torch.tensor(std).view(3, 1, 1) * 255).abs()


def assert_same_view(found: Tensor, expected: Tensor, std: tuple[float, ...]) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    difference = levels(found, expected, std)
    # Both round to bytes between the two passes of the resize, from weights of 16 and 22 bits.
    assert difference.max() < 3.5
    assert (difference > 1.5).float().mean() < 1e-3
    assert difference.mean() < 0.25  # a shift by half a pixel makes it 5


SIZES = [(300, 400), (400, 301), (224, 299), (224, 224), (97, 512), (120, 100), (31, 20)]


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "crop", "timm_mode"),
    [
        ((224, 224), 0.875, "crop", "center"),
        ((224, 224), 1.0, "crop", "center"),
        ((112, 112), 0.9, "crop", "center"),
        ((96, 160), 0.9, "crop", "center"),
        ((224, 224), 1.0, "squash", "squash"),
        ((112, 160), 1.0, "pad", "border"),
        ((128, 128), 1.0, "pad", "border"),
    ],
)
def test_equals_timm(
    image_size: tuple[int, int], interpolation: str, size: tuple[int, int], crop_pct: float, crop: str, timm_mode: str
) -> None:
    from timm.data import create_transform

    # A mean of whole bytes, since timm rounds the colour it pads with.
    mean, std = (102 / 255, 128 / 255, 153 / 255), (0.2, 0.25, 0.3)
    theirs = create_transform(
        (3, *size), interpolation=interpolation, crop_pct=crop_pct, crop_mode=timm_mode, mean=mean, std=std
    )
    image = picture(*image_size)
    ours = eval_transform(Preprocess(size, mean, std, interpolation, crop, crop_pct))
    assert_same_view(ours(tensor(image)), theirs(image), std)


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("size", [224, (96, 160)])
@pytest.mark.parametrize(("crop", "resize_mode"), [("crop", "shortest"), ("squash", "squash"), ("pad", "longest")])
def test_equals_open_clip(
    image_size: tuple[int, int], size: int | tuple[int, int], crop: str, resize_mode: str
) -> None:
    from open_clip.transform import image_transform

    theirs = image_transform(
        size, is_train=False, mean=MEAN, std=STD, resize_mode=resize_mode, fill_color=tuple(0 for _ in MEAN)
    )
    image = picture(*image_size)
    pair = (size, size) if isinstance(size, int) else size
    found, expected = eval_transform(Preprocess(pair, MEAN, STD, crop=crop))(tensor(image)), theirs(image)
    if crop == "pad":  # open_clip pads with black, we with the mean; timm's test covers the frame
        inside = found.abs().amax(0) > 0
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        window = (slice(None), slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        assert window[1].stop - window[1].start == pair[0] or window[2].stop - window[2].start == pair[1]
        found, expected = found[window], expected[window]
    assert_same_view(found, expected, STD)


def test_normalisation_is_exact() -> None:
    view = eval_transform(Preprocess((16, 16), MEAN, STD))(
        torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    )
    values = torch.arange(256, dtype=torch.float64).view(1, 16, 16) / 255
    expected = (values - torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(STD).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(view.double(), expected, atol=1e-6, rtol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop=st.sampled_from(["crop", "pad", "squash"]),
    crop_pct=st.floats(0.5, 1.0),
    augment=st.sampled_from([None, *AUGMENT]),
)
def test_any_image_fits_any_backbone(
    height: int, width: int, size: tuple[int, int], crop: str, crop_pct: float, augment: str | None
) -> None:
    preprocess = Preprocess(size, MEAN, STD, crop=crop, crop_pct=crop_pct)
    transform = eval_transform(preprocess) if augment is None else train_transform(preprocess, augment)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    view = transform(torch.full((3, height, width), 255, dtype=torch.uint8))
    assert view.shape == (3, *size)
    if augment is None:  # all white, or the mean around it
        inside = view.abs().amax(0) > 0
        assert inside.any()
        assert inside.all() or crop == "pad"
        torch.testing.assert_close(view[:, inside], white[:, None].expand(3, int(inside.sum())), atol=1e-5, rtol=1e-5)
    assert view.isfinite().all()


def test_evaluation_draws_nothing_and_the_input_is_left_alone() -> None:
    image = tensor(picture(60, 80))
    copy = image.clone()
    state = torch.get_rng_state()
    for crop in ("crop", "pad", "squash"):
        for size in ((32, 32), (60, 80)):
            eval_transform(Preprocess(size, MEAN, STD, crop=crop))(image)
    assert torch.equal(torch.get_rng_state(), state)
    for name in AUGMENT:
        train_transform(Preprocess((60, 80), MEAN, STD), name)(image)
    assert torch.equal(image, copy)


# --- random views ---------------------------------------------------------------------------------------------------


def seeded(transform: transforms.TrainTransform, image: Tensor, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(image)


@pytest.mark.parametrize("name", AUGMENT)
def test_presets_are_functions_of_the_seed(name: str) -> None:
    transform = train_transform(Preprocess((32, 48), MEAN, STD), name)
    image = tensor(picture(70, 90))
    first = seeded(transform, image, 1)
    assert torch.equal(first, seeded(transform, image, 1))
    assert torch.equal(first, seeded(transform, image, 2)) == (name == "none")
    assert first.shape == (3, 32, 48)


def test_none_is_the_evaluation_view() -> None:
    for crop in ("crop", "pad", "squash"):
        preprocess = Preprocess((32, 48), MEAN, STD, crop=crop, crop_pct=0.9)
        image = tensor(picture(70, 90))
        assert torch.equal(train_transform(preprocess, "none")(image), eval_transform(preprocess)(image))


def test_four_presets_mirror_and_no_other() -> None:
    assert {name for name, augment in AUGMENT.items() if augment.flip} == {"mirrored", "medium", "imagenet", "dino"}
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).view(1, 1, 64).repeat(3, 64, 1)
    turned = dict.fromkeys(AUGMENT, 0)
    for name in AUGMENT:
        transform = train_transform(Preprocess((32, 32), MEAN, STD), name)
        for seed in range(40):
            view = seeded(transform, ramp, seed)
            turned[name] += bool(view[0, 16, 2] > view[0, 16, -3])
    assert 10 <= turned.pop("mirrored") <= 30
    assert 10 <= turned.pop("medium") <= 30
    assert 10 <= turned.pop("imagenet") <= 30
    assert 10 <= turned.pop("dino") <= 30  # which also inverts no picture: it is `multi_crop` that solarises
    assert set(turned.values()) == {0}


@pytest.mark.parametrize("shape", [(400, 400), (300, 500), (450, 600)])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_random_crop_has_the_area_and_shape_it_says(shape: tuple[int, int], size: tuple[int, int]) -> None:
    high, wide = shape
    # Red grows with x and green with y, so that the edges of a view tell where it was cut.
    coordinates = torch.zeros(3, high, wide, dtype=torch.uint8)
    coordinates[0] = (torch.arange(wide) * 255 / (wide - 1)).round().to(torch.uint8)[None, :]
    coordinates[1] = (torch.arange(high) * 255 / (high - 1)).round().to(torch.uint8)[:, None]
    image = coordinates.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    transform = train_transform(Preprocess(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), Augment(scale=(0.2, 0.6)))
    areas, aspects, middles = [], [], []
    for seed in range(300):
        view = seeded(transform, image, seed)
        x0, x1 = view[0, size[0] // 2, [2, -3]].tolist()
        y0, y1 = view[1, [2, -3], size[1] // 2].tolist()
        w, h = (x1 - x0) * size[1] / (size[1] - 5) * wide, (y1 - y0) * size[0] / (size[0] - 5) * high
        areas.append(w * h / (wide * high))
        aspects.append(w / h * size[0] / size[1])
        middles.append(((x0 + x1) / 2, (y0 + y1) / 2))
    assert min(areas) > 0.2 * 0.93
    assert max(areas) < 0.6 * 1.07
    assert np.std(areas) > 0.08
    assert min(aspects) > 3 / 4 * 0.93
    assert max(aspects) < 4 / 3 * 1.07
    assert np.quantile(aspects, 0.1) < 0.95 < 1.05 < np.quantile(aspects, 0.9) or shape != (400, 400)
    assert np.abs(np.mean(middles, axis=0) - 0.5).max() < 0.05
    assert (np.std(middles, axis=0) > 0.05).all()


def test_random_crop_of_everything_is_a_squash_free_centre() -> None:
    """Where no crop of the area asked for fits, the largest central one is taken, as torchvision does."""
    image = tensor(picture(40, 400))
    view = train_transform(Preprocess((32, 32), MEAN, STD), Augment(scale=(1.0, 1.0)))(image)
    cut = tensor(picture(40, 400).crop((173, 0, 226, 40)))  # 40 x 4/3 = 53 wide
    expected = eval_transform(Preprocess((32, 32), MEAN, STD, crop="squash"))(cut)
    assert levels(view, expected, STD).max() <= 1


def test_moving_equals_affine_grid() -> None:
    values = torch.randn(3, 24, 36)
    augment = Augment(rotate=30.0, zoom=(0.7, 1.3), shift=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        turn, size, down, across = torch.rand(4, dtype=torch.float32).double().tolist()
        torch.manual_seed(5)
        found = transforms._moved(values, augment)
    angle, zoom = math.radians(30 * (2 * turn - 1)), 0.7 + 0.6 * size
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    # In pixels: the point of the frame at (x, y) from its centre shows that of the picture at R (x, y) / zoom + shift.
    matrix = [[cos, -sin * 24 / 36, 0.4 * (2 * across - 1)], [sin * 36 / 24, cos, 0.4 * (2 * down - 1)]]
    grid = torch_f.affine_grid(torch.tensor([matrix], dtype=torch.float64), [1, 3, 24, 36], align_corners=False)
    expected = torch_f.grid_sample(values.double()[None], grid, padding_mode="border", align_corners=False)[0]
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_moving_keeps_a_flat_picture_and_its_circles() -> None:
    flat = torch.full((3, 20, 30), 0.7)
    torch.testing.assert_close(transforms._moved(flat, Augment(rotate=45.0, zoom=(0.5, 1.5), shift=0.3)), flat)
    y, x = torch.meshgrid(torch.arange(60) - 29.5, torch.arange(90) - 44.5, indexing="ij")
    disc = ((x**2 + y**2) < 200).float().expand(3, 60, 90)
    turned = transforms._moved(disc, Augment(rotate=180.0))
    assert (turned - disc).abs().mean() < 0.01  # a turn about the centre, not a shear: sides of 60 and 90 differ


@pytest.mark.parametrize("seed", range(4))
def test_colour_jitter_equals_one_step_after_another(seed: int) -> None:
    view = (tensor(picture(20, 30)) // 2 + 60).to(torch.uint8)  # far from 0 and 255, so that nothing is clamped between
    augment = Augment(brightness=0.2, contrast=0.3, saturation=0.4, grey=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        b, c, s, g = torch.rand(4).double().tolist()
        torch.manual_seed(seed)
        found = transforms._recoloured(view, Preprocess((20, 30), MEAN, STD), augment)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    values = view.double()
    saturation = 0.0 if g < 0.5 else 1 + 0.4 * (2 * s - 1)
    own = torch.einsum("c,chw->hw", luma, values)
    values = saturation * values + (1 - saturation) * own
    mean = torch.einsum("c,chw->hw", luma, values).mean()
    values = (1 + 0.3 * (2 * c - 1)) * (values - mean) + mean
    values = (1 + 0.2 * (2 * b - 1)) * values
    assert values.min() > 0
    assert values.max() < 255
    expected = (values / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    if g < 0.5:
        plain = found * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        torch.testing.assert_close(plain[0], plain[2], atol=1e-5, rtol=1e-5)


def test_seeds_0_to_3_meet_both_grey_and_colour() -> None:
    drawn = []
    for seed in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn.append(torch.rand(4)[3].item() < 0.5)
    assert len(set(drawn)) == 2


def test_an_unknown_preset_names_the_known() -> None:
    with pytest.raises(InputError, match="standard"):
        train_transform(Preprocess((8, 8), MEAN, STD), "strong")


def test_decoders_are_told_what_is_needed() -> None:
    assert eval_transform(Preprocess((224, 192), MEAN, STD, crop_pct=0.875)).at_least == (256, 219)
    assert eval_transform(Preprocess((224, 192), MEAN, STD, crop="pad", crop_pct=0.875)).at_least == (224, 192)
    assert train_transform(Preprocess((224, 192), MEAN, STD, crop_pct=0.5), "none").at_least == (448, 384)


# --- several views --------------------------------------------------------------------------------------------------


def test_multi_crop_gives_two_large_views_and_small_ones() -> None:
    image = torch.randint(256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = multi_crop(Preprocess((112, 112), MEAN, STD), small_crops=10)
    torch.manual_seed(1)
    found = transform(image)
    assert {name: tuple(view.shape) for name, view in found.items()} == {
        "image": (3, 112, 112),
        "views": (2, 3, 112, 112),
        "crops": (10, 3, 48, 48),
    }
    assert torch.equal(found["image"], found["views"][0])
    every = [*found["views"], *found["crops"]]
    assert all(view.isfinite().all() for view in every)
    assert len({round(float(view.double().sum()), 3) for view in every}) == 12, "each is drawn on its own"
    assert [one.augment.blur for one in transform.large] == [1.0, 0.1]
    assert [one.augment.solarise for one in transform.large] == [0.0, 0.2]
    assert transform.small[0].augment.blur == 0.5
    assert "crops" not in multi_crop(Preprocess((64, 64), MEAN, STD), small_crops=0)(image)
    plain = multi_crop(Preprocess((64, 64), MEAN, STD), "standard")
    assert all(not one.augment.blur and not one.augment.solarise for one in (*plain.large, *plain.small))


def test_small_views_show_less_of_the_image() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 256, 256).contiguous()
    transform = multi_crop(
        Preprocess((64, 64), (0.0,) * 3, (1.0,) * 3), "standard", large_scale=(0.5, 1.0), small_scale=(0.05, 0.25)
    )
    for seed in range(20):
        torch.manual_seed(seed)
        found = transform(ramp)
        wide = [float(view[0].max() - view[0].min()) for view in found["views"]]
        narrow = [float(view[0].max() - view[0].min()) for view in found["crops"]]
        assert min(wide) > 0.55
        assert max(narrow) < 0.65


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"large_scale": (0.5, 0.2)}, "large_scale"),
        ({"small_scale": (0.0, 0.2)}, "small_scale"),
        ({"small_crops": -1}, "small"),
    ],
)
def test_multi_crop_refuses_what_is_no_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        multi_crop(Preprocess((64, 64), MEAN, STD), **changes)


def view_of(image: Tensor, **changes: float) -> Tensor:
    """Pixels of 0 to 255 through one change of colours."""
    torch.manual_seed(0)
    return 255 * train_transform(Preprocess(tuple(image.shape[1:]), (0.0,) * 3, (1.0,) * 3), Augment(**changes))(image)


def test_a_turn_of_hues_keeps_greys_and_sums() -> None:
    grey = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    assert torch.allclose(view_of(grey, hue=0.5), grey.float(), atol=1e-3)
    image = torch.randint(100, 150, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    turned = view_of(image, hue=0.1)
    assert not torch.allclose(turned, image.float(), atol=1)
    assert torch.allclose(turned.sum(0), image.float().sum(0), atol=1e-2)
    assert torch.equal(view_of(image, hue=0.1, jitter=0.0), view_of(image, grey=1e-9)), "no jitter, no turn"


def test_a_blur_is_the_gaussian_of_its_width() -> None:
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    image[:, 112, 112] = 255
    spread = view_of(image, blur=1.0)
    assert spread[0].sum().item() == pytest.approx(255, rel=1e-3)
    across = spread[0].sum(0) / 255
    place = torch.arange(224) - 112.0
    torch.manual_seed(0)
    torch.rand(5)  # of the four colours, and whether to blur
    sigma = 0.1 + 1.9 * torch.rand(()).item()
    assert (across * place).sum().item() == pytest.approx(0, abs=1e-4)
    assert (across * place**2).sum().item() == pytest.approx(sigma**2, rel=0.05)


def test_what_is_bright_is_inverted() -> None:
    image = torch.tensor([0, 100, 127, 128, 200, 255], dtype=torch.uint8).view(1, 1, 6).repeat(3, 1, 1)
    assert view_of(image, solarise=1.0)[0, 0].round().tolist() == [0, 100, 127, 127, 55, 0]
