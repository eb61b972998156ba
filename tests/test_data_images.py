"""Decoding: the fast path equals Pillow, boxes and rotations land where they should, and bad files say their name."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vicinal.data import images
from vicinal.data.images import MAX_PIXELS, Cutout, decode, image_size, pixel_box, read_image
from vicinal.types import InputError


def waves(height: int, width: int, *, cycles: int = 6) -> Image.Image:
    """Smooth, with known phase everywhere and no symmetry, so that a shift of a quarter pixel shows."""
    y, x = np.mgrid[0:height, 0:width]
    y, x = (y + 0.5) / height, (x + 0.5) / width
    planes = [
        np.sin(2 * np.pi * cycles * x),
        np.sin(2 * np.pi * cycles * y),
        np.cos(2 * np.pi * cycles * (x + 0.3 * y)),
    ]
    return Image.fromarray((127.5 + 100 * np.stack(planes, -1)).astype(np.uint8))


def bytes_of(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    image.save(file, kind, **options)
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def by_pillow(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


# --- equality with Pillow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_pixels_are_those_of_pillow(tmp_path: Path, kind: str):
    path = write(tmp_path / f"picture.{kind.lower()}", bytes_of(waves(61, 83), kind))
    expected = np.asarray(by_pillow(path))
    found = read_image(path)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(as_array(found), expected)
    assert image_size(path) == (61, 83)


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 2}, {"quality": 40}, {"comment": b"x" * 300}]
)
def test_jpeg_variants_are_those_of_pillow(tmp_path: Path, options: dict[str, object]):
    path = write(tmp_path / "a.jpg", bytes_of(waves(61, 83), **options))
    np.testing.assert_array_equal(as_array(read_image(path)), np.asarray(by_pillow(path)))


@pytest.mark.parametrize("at_least", [None, (40, 40), (20, 60)])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_exif_orientation(tmp_path: Path, kind: str, orientation: int, at_least: tuple[int, int] | None):
    # Odd sides, so that a scaled decode ends between pixels, at the far edge or (mirrored) at the near one.
    path = write(tmp_path / "a.img", bytes_of(waves(331, 403, cycles=4), kind, exif=exif(orientation)))
    upright = by_pillow(path)
    assert image_size(path) == (upright.height, upright.width)
    if at_least is None:
        np.testing.assert_array_equal(as_array(read_image(path)), np.asarray(upright))
    cutout = decode(path, at_least=at_least)
    assert cutout.size == (upright.height, upright.width)
    assert (cutout.pixels.shape[1] < upright.height) == (kind == "JPEG" and at_least is not None)
    size = (upright.height // 5, upright.width // 5)
    expected = np.asarray(upright.resize(size[::-1], Image.Resampling.BICUBIC))
    difference = np.abs(as_array(cutout.resized(size, "bicubic")).astype(int) - expected)
    assert difference.max() <= (4 if at_least else 1)  # a quarter of a pixel of these waves is 8


def test_the_size_stands_behind_a_long_comment(tmp_path: Path) -> None:
    data = bytes_of(waves(20, 30))
    comment = b"\xff\xfe\xff\xff" + b"x" * 65533
    assert image_size(write(tmp_path / "a.jpg", data[:2] + comment + comment + data[2:])) == (20, 30)
    with pytest.raises(InputError, match=r"b\.jpg.*no image"):
        image_size(write(tmp_path / "b.jpg", b"<html>"))


def test_big_endian_exif_and_fill_bytes(tmp_path: Path):
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHH", 1, 0x0112, 3, 1, 6, 0) + b"\0\0\0\0"
    data = bytes_of(waves(20, 30), exif=b"Exif\0\0" + tiff)
    assert read_image(write(tmp_path / "a.jpg", data)).shape == (3, 30, 20)
    filled = data[:2] + b"\xff\xff" + data[2:]  # fill bytes may stand before any marker
    assert read_image(write(tmp_path / "b.jpg", filled)).shape == (3, 30, 20)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    orientation=st.integers(0, 9),
    progressive=st.booleans(),
    grey=st.booleans(),
    comment=st.binary(max_size=40),
)
def test_own_jpeg_header_agrees_with_pillow(
    height: int, width: int, orientation: int, progressive: bool, grey: bool, comment: bytes
):
    image = Image.new("L" if grey else "RGB", (width, height))
    data = bytes_of(image, exif=exif(orientation), progressive=progressive, comment=comment)
    header = images._jpeg_header(data)
    assert header is not None
    assert (header.height, header.width, header.components) == (height, width, 1 if grey else 3)
    assert header.orientation == (orientation if 1 <= orientation <= 8 else 1)


def test_the_fast_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_decode_pillow", None)
    read_image(write(tmp_path / "a.jpg", bytes_of(waves(30, 40), exif=exif(6))))
    read_image(write(tmp_path / "b.jpg", bytes_of(waves(30, 40).convert("L"))))


# --- modes ----------------------------------------------------------------------------------------------------------


def modes() -> dict[str, tuple[Image.Image, str, dict[str, object], tuple[int, int, int]]]:
    """Mode -> a flat picture, its format, how to save it, and the colour that has to come out."""
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    wide = Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    return {
        "RGB": (Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", {}, (1, 2, 3)),
        "L": (Image.new("L", (8, 8), 77), "PNG", {}, (77, 77, 77)),
        "L-jpeg": (Image.new("L", (8, 8), 77), "JPEG", {}, (77, 77, 77)),
        "1": (Image.new("1", (8, 8), 1), "PNG", {}, (255, 255, 255)),
        "P": (palette, "PNG", {}, (10, 200, 30)),
        "P-transparent": (palette, "PNG", {"transparency": 1}, (255, 255, 255)),
        "RGB-transparent": (Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, (255, 255, 255)),
        "L-transparent": (Image.new("L", (8, 8), 9), "PNG", {"transparency": 9}, (255, 255, 255)),
        "RGBA-clear": (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "PNG", {}, (255, 255, 255)),
        "RGBA-half": (Image.new("RGBA", (8, 8), (0, 100, 255, 51)), "PNG", {}, (204, 224, 255)),
        "RGBA-webp": (Image.new("RGBA", (8, 8), (0, 100, 255, 51)), "WEBP", {"lossless": True}, (204, 224, 255)),
        "LA": (Image.new("LA", (8, 8), (0, 51)), "PNG", {}, (204, 204, 204)),
        "I;16": (wide, "PNG", {}, (128, 128, 128)),
        "CMYK": (Image.new("CMYK", (8, 8), (0, 0, 0, 55)), "JPEG", {}, (200, 200, 200)),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str):
    image, kind, options, colour = modes()[mode]
    found = read_image(write(tmp_path / "a", bytes_of(image, kind, **options)))
    assert found.shape == (3, 8, 8)
    assert (found.permute(1, 2, 0).int() - torch.tensor(colour)).abs().max() <= 1


def test_first_frame_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


# --- boxes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 6, 8, 3])
def test_a_box_is_cut_from_the_upright_image(tmp_path: Path, kind: str, orientation: int):
    path = write(tmp_path / "a", bytes_of(waves(60, 90), kind, exif=exif(orientation)))
    upright = by_pillow(path)
    found = read_image(path, box=(10.4, 20.6, 40.0, 58.0))
    np.testing.assert_array_equal(as_array(found), np.asarray(upright.crop((10, 21, 40, 58))))


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    corners=st.tuples(*[st.floats(0, 1) for _ in range(4)]),
    padding=st.floats(0, 2),
)
def test_pixel_box_stays_inside_and_grows_with_padding(
    size: tuple[int, int], corners: tuple[float, ...], padding: float
):
    height, width = size
    x0, x1 = sorted((corners[0] * width, corners[1] * width))
    y0, y1 = sorted((corners[2] * height, corners[3] * height))
    if x0 == x1 or y0 == y1:
        with pytest.raises(InputError, match="empty"):
            pixel_box((x0, y0, x1, y1), size)
        return
    left, top, right, bottom = pixel_box((x0, y0, x1, y1), size)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert abs(left - x0) <= 1
    assert abs(bottom - y1) <= 1.5  # a box between two pixel centres still gets a pixel
    wider = pixel_box((x0, y0, x1, y1), size, padding=padding)
    if x1 - x0 >= 1 and y1 - y0 >= 1:  # a narrower box was rounded to a whole pixel on one of its sides
        assert wider[0] <= left
        assert wider[1] <= top
        assert wider[2] >= right
        assert wider[3] >= bottom


def test_padding_is_a_share_of_the_longer_side_and_ends_at_the_image():
    assert pixel_box((40, 40, 60, 50), (100, 100), padding=0.5) == (30, 30, 70, 60)
    assert pixel_box((0, 40, 20, 50), (100, 100), padding=0.5) == (0, 30, 30, 60)
    assert pixel_box((-0.6, 0, 100.9, 100), (100, 100)) == (0, 0, 100, 100)


@pytest.mark.parametrize(
    "box",
    [(50, 50, 110, 60), (-5, 0, 10, 10), (200, 200, 210, 210), (10, 10, 10, 20), (20, 10, 10, 20), (0, 0, math.nan, 5)],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_box_outside_names_file_and_box(tmp_path: Path, kind: str, box: tuple[float, ...]):
    path = write(tmp_path / "shelf.img", bytes_of(waves(100, 100), kind))
    with pytest.raises(InputError, match=r"shelf\.img") as caught:
        read_image(path, box=box)
    assert f"{box[0]:g}, {box[1]:g}, {box[2]:g}, {box[3]:g}" in str(caught.value)
    assert "upright" in str(caught.value)


# --- decoding at a fraction -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(40, 700), width=st.integers(40, 700), need=st.tuples(st.integers(5, 200), st.integers(5, 200))
)
def test_a_fraction_is_large_enough(height: int, width: int, need: tuple[int, int]):
    found = images._decode_jpeg(
        bytes_of(Image.new("RGB", (width, height))), images._Jpeg(height, width, 3, 1), "a.jpg", None, 0.0, need
    )
    assert found is not None
    h, w = found.pixels.shape[1:]
    assert found.size == (height, width)
    if (h, w) != (height, width):
        assert found.edges[3] >= 2 * need[0]
        assert found.edges[2] >= 2 * need[1]
    share = max(need[0] / height, need[1] / width)
    if share <= 1 / 16:
        assert h == math.ceil(height / 8)
    if share > 1 / 4:
        assert (h, w) == (height, width)


@pytest.mark.parametrize("orientation", [1, 4, 6, 7])
@pytest.mark.parametrize("box", [(101.0, 53.0, 900.0, 640.0), (3.0, 2.0, 590.0, 601.0)])
def test_a_box_in_a_fraction_keeps_its_edges(tmp_path: Path, box: tuple[float, ...], orientation: int):
    path = write(tmp_path / "a.jpg", bytes_of(waves(1001, 1003, cycles=12), exif=exif(orientation)))
    size = (100, 120)
    whole, part = decode(path, box=box), decode(path, box=box, at_least=size)
    assert whole.size == part.size
    assert part.pixels.numel() < whole.pixels.numel() / 3
    difference = whole.resized(size, "bicubic").int() - part.resized(size, "bicubic").int()
    assert difference.abs().max() <= 5
    rounded = read_image(path, box=box, at_least=size)
    assert abs(rounded.shape[1] - (part.edges[3] - part.edges[1])) <= 0.5


def test_edges_are_not_rounded(tmp_path: Path):
    """The planted mistake of every naive scaled decode: 1198 x 3/8 taken for 450 pixels."""
    path = write(tmp_path / "a.jpg", bytes_of(waves(1198, 802, cycles=20)))
    exact = decode(path).resized((149, 100), "bicubic").int()
    scaled = decode(path, at_least=(149, 100))
    assert scaled.edges == (0.0, 0.0, 200.5, 299.5)
    # Without the last row and column, where the filter meets the edge.
    assert (scaled.resized((149, 100), "bicubic").int() - exact)[:, :-1, :-1].abs().max() <= 5
    careless = Cutout.whole(scaled.pixels).resized((149, 100), "bicubic").int()
    assert (careless - exact)[:, :-1, :-1].abs().max() > 15


def test_resized_to_itself_is_itself():
    pixels = torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)
    assert Cutout.whole(pixels).resized((7, 9), "bicubic") is pixels


# --- what cannot be used --------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims to be large."""
    data = b"\x89PNG\r\n\x1a\n"
    body = zlib.compress(b"\0" * 1000)
    for name, content in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", body)):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(bytes_of(Image.new("RGB", (16, 16))))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def unusable() -> dict[str, tuple[bytes, str]]:
    jpeg, png = bytes_of(waves(80, 80)), bytes_of(waves(80, 80), "PNG")
    floats = bytes_of(Image.new("F", (8, 8), 0.5), "TIFF")
    return {
        "empty": (b"", "empty"),
        "text": (b"<html>404 not found</html>", "no image"),
        "jpeg cut short": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "jpeg without a body": (jpeg[:200], ""),
        "jpeg of two bytes": (jpeg[:2], ""),
        "png cut short": (png[: len(png) // 2], "cannot be decoded"),
        "png with a broken body": (png[:60] + b"\0" * 40 + png[100:], ""),
        "floats": (floats, "8 bits"),
        "png bomb": (png_header(20_000, 15_000), f"{MAX_PIXELS:,}"),
        "png large bomb": (png_header(100_000, 100_000), f"{MAX_PIXELS:,}"),
        "jpeg bomb": (jpeg_header(60_000, 60_000), f"{MAX_PIXELS:,}"),
    }


@pytest.mark.parametrize("what", unusable())
def test_what_cannot_be_used_names_the_file(tmp_path: Path, what: str):
    data, words = unusable()[what]
    path = write(tmp_path / "culprit.jpg", data)
    with pytest.raises(InputError, match=r"culprit\.jpg") as caught:
        read_image(path, at_least=(10, 10))
    assert words in str(caught.value)
    assert "on_error=skip" in str(caught.value)  # the way to mend it


def test_a_large_image_below_the_limit_is_read_without_a_warning(tmp_path: Path):
    side = 9_600  # 92 million pixels: Pillow alone would warn
    path = tmp_path / "scan.png"
    Image.new("1", (side, side)).save(path)
    assert decode(path, box=(0, 0, 5, 5)).size == (5, 5)


def test_a_missing_file_and_a_folder(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere\.jpg: there is no such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(InputError, match=tmp_path.name):
        read_image(tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.jpg"):
        image_size(tmp_path / "nowhere.jpg")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP"]))
def test_damage_is_an_input_error_or_a_picture(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
):
    content = bytearray(bytes_of(waves(24, 24), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = write(tmp_path_factory.getbasetemp() / "damaged", bytes(content[:cut]))
    try:
        pixels = read_image(path, at_least=(8, 8))
    except InputError as error:
        message = str(error)
    else:
        message = "damaged, and read all the same" if pixels.shape[0] == 3 else ""
    assert "damaged" in message


# --- real photos ----------------------------------------------------------------------------------------------------


def test_real_photos_equal_pillow(real_data: Path):
    files = sorted((real_data / "grocery" / "images").rglob("*.jpg"))[::500]
    files += sorted((real_data / "clothing" / "images").glob("*.jpg"))[::500]
    assert len(files) > 15
    for file in files:
        expected = np.asarray(by_pillow(file))
        np.testing.assert_array_equal(as_array(read_image(file)), expected)
