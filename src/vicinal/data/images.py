"""Decoding: a file of pixels becomes an upright RGB tensor of bytes, cut to its box.

A JPEG may be decoded at n/8 of its size (its cosine transform is cut short, which costs less than decoding it whole),
as long as what remains is at least `OVERSAMPLING` times as large as the caller needs. At twice the size the embedding of
the image that is then resized keeps a cosine of 0.9998 and more to the full decode; at once the size it does not.

Letters: H, W height and width in pixels, after the rotation that EXIF asks for.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from vicinal.types import InputError

__all__ = ["MAX_PIXELS", "OVERSAMPLING", "image_size", "pixel_box", "read_image"]

MAX_PIXELS: Final = 178_956_970
"""Larger images are refused before they are decoded. The number at which Pillow refuses, too: 0.5 GB of RGB bytes."""

OVERSAMPLING: Final = 2
"""How many times larger than needed a JPEG stays when it is decoded at a fraction of its size."""

_SIDEWAYS: Final = frozenset({5, 6, 7, 8})  # the EXIF orientations that exchange height and width
_EXIF_ORIENTATION: Final = 0x0112


def read_image(
    path: str | Path,
    *,
    box: Sequence[float] | None = None,
    padding: float = 0.0,
    at_least: tuple[int, int] | None = None,
) -> UInt8[Tensor, "3 H W"]:
    """Decode an image file: upright, cut to its box, RGB.

    Transparent pixels are laid over white; palettes, grey, 1-bit, 16-bit grey and CMYK become 8-bit RGB; of an
    animation the first frame is taken. Colour profiles are ignored, as the pipelines of the pretrained models do.
    The tensor is channels-last in memory (what the decoder wrote, not copied), the form that resizing is fastest on.

    Args:
        path: of a JPEG, PNG, WebP, GIF, BMP, TIFF or another file that Pillow reads.
        box: x0, y0, x1, y1 in pixels of the upright image; None for the whole of it. Fractions are rounded outwards
            to whole pixels only after padding, see `pixel_box`.
        padding: how much the box is widened on every side, as a share of its longer side. It ends where the image does.
        at_least: height and width that the caller will resize to. The result may then be smaller than the file says,
            but not below twice this (nor larger than the file). None: every pixel.

    Raises:
        InputError: the file is missing, is no image, is cut short, has more than `MAX_PIXELS` pixels, or does not hold
            the box. The message names the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (40, 30), 255).save(f"{folder}/grey.png")
    ...     read_image(f"{folder}/grey.png", box=(10, 0, 20, 30)).shape
    torch.Size([3, 30, 10])
    """
    data = _bytes_of(path)
    jpeg = _jpeg_header(data)
    if jpeg is not None:
        pixels = _read_jpeg(data, jpeg, path, box, padding, at_least)
        if pixels is not None:
            return torch.from_numpy(pixels).permute(2, 0, 1)
    return torch.from_numpy(_read_pillow(data, path, box, padding)).permute(2, 0, 1)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the upright image, from the file's header alone (a broken body is not noticed).

    Raises:
        InputError: the file is missing or is no image.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (40, 30)).save(f"{folder}/a.jpg")
    ...     image_size(f"{folder}/a.jpg")
    (30, 40)
    """
    data = _bytes_of(path)
    jpeg = _jpeg_header(data)
    if jpeg is not None:
        height, width, sideways = jpeg.height, jpeg.width, jpeg.orientation in _SIDEWAYS
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data))
            width, height = image.size
            sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
        except Exception as error:  # on a broken header Pillow raises what its parsers happen to meet
            raise _unreadable(path, data, error) from error
    return (width, height) if sideways else (height, width)


def pixel_box(
    box: Sequence[float], size: tuple[int, int], *, padding: float = 0.0, name: str | Path = "the image"
) -> tuple[int, int, int, int]:
    """The whole pixels of a box: left, top, right, bottom, right and bottom excluded.

    The box is widened by `padding`, rounded to the nearest pixel edges (as Pillow crops; at least one pixel stays) and
    cut at the edges of the image. A box that sticks out by up to one pixel has been rounded by whoever wrote it, and is
    cut; one that sticks out further does not belong to this image.

    Args:
        box: x0, y0, x1, y1 in pixels.
        size: height and width of the image.
        padding: share of the box's longer side that is added on each of its four sides.
        name: of the image, for the message.

    Raises:
        InputError: the box is empty, or sticks out of the image by more than a pixel.

    >>> pixel_box((10.4, 5.0, 30.0, 15.0), (100, 100), padding=0.1)
    (8, 3, 32, 17)
    """
    height, width = size
    x0, y0, x1, y1 = (float(edge) for edge in box)
    shown = f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    how = "a box is x0, y0, x1, y1 in pixels of the upright (EXIF-rotated) image; COCO files hold x, y, width, height"
    if not (math.isfinite(x0 + y0 + x1 + y1) and x1 > x0 and y1 > y0):
        raise InputError(f"{name}: {shown} is empty; {how}")
    if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:
        raise InputError(f"{name}: {shown} lies outside the image, which is {width} x {height} pixels; {how}")
    margin = padding * max(x1 - x0, y1 - y0)
    left, right = _whole(x0 - margin, x1 + margin, width)
    top, bottom = _whole(y0 - margin, y1 + margin, height)
    return left, top, right, bottom


def _whole(low: float, high: float, length: int) -> tuple[int, int]:
    first = min(max(round(low), 0), length - 1)
    return first, min(max(round(high), first + 1), length)


def _bytes_of(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  (half the time of Path.open, and this is once an image)
            return file.read()
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(
            f"{path}: {reason}; mend the path in the table (relative paths start at the table's root), "
            "or set on_error=skip"
        ) from error


def _unreadable(path: str | Path, data: bytes, error: Exception) -> InputError:
    if not data:
        reason = "the file is empty"
    elif isinstance(error, Image.UnidentifiedImageError):
        reason = "this is no image in a format that can be read (HEIC, AVIF or SVG: convert it to JPEG or PNG)"
    else:
        reason = f"the image cannot be decoded: {error}"
    return InputError(f"{path}: {reason}; replace the file, drop its row, or set on_error=skip")


def _refuse_bomb(path: str | Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{path}: {width} x {height} pixels are more than the limit of {MAX_PIXELS:,} (a decompression bomb, "
            "or a scan that should be tiled); make it smaller, drop its row, or set on_error=skip"
        )


class _Jpeg(NamedTuple):
    height: int
    width: int
    components: int
    orientation: int


def _jpeg_header(data: bytes) -> _Jpeg | None:
    """Size, components and EXIF orientation, by walking the segments before the pixels. None: leave it to Pillow.

    20 times faster than Pillow's parser, which reads every tag; a 224-pixel photo is decoded in a tenth of a
    millisecond, so that is a sixth of the whole.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, end, orientation = 2, len(data) - 9, 1
    while at < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame: the size stands here
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            ordinary = marker <= 0xC2 and data[at + 4] == 8 and height and width  # 8 bits a sample, Huffman-coded
            return _Jpeg(height, width, data[at + 9], orientation) if ordinary else None
        elif marker == 0xDA or length < 2:
            return None
        at += 2 + length
    return None


def _exif_orientation(tiff: bytes) -> int:
    """The orientation in an EXIF block, 1 (upright) where it has none or is broken."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if order == "little" else "big")

    directory = number(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(tiff) - 11), 12):
        if number(entry, 2) == _EXIF_ORIENTATION:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _read_jpeg(
    data: bytes,
    jpeg: _Jpeg,
    path: str | Path,
    box: Sequence[float] | None,
    padding: float,
    at_least: tuple[int, int] | None,
) -> UInt8[np.ndarray, "H W 3"] | None:
    """The fast path. None where the decoder meets something odd: Pillow is then asked, and words the error."""
    if jpeg.components not in (1, 3):
        return None
    height, width = jpeg.height, jpeg.width
    _refuse_bomb(path, height, width)
    sideways = jpeg.orientation in _SIDEWAYS
    upright = (width, height) if sideways else (height, width)
    crop = None if box is None else pixel_box(box, upright, padding=padding, name=path)
    least = (0, 0)
    if at_least is not None:
        left, top, right, bottom = crop or (0, 0, upright[1], upright[0])
        # What the whole image must measure, so that the cut-out measures OVERSAMPLING x at_least.
        least = (
            math.ceil(OVERSAMPLING * at_least[0] * upright[0] / (bottom - top)),
            math.ceil(OVERSAMPLING * at_least[1] * upright[1] / (right - left)),
        )
        least = (least[1], least[0]) if sideways else least
        if least[0] > height or least[1] > width:  # libjpeg then picks the nearest it has; we want every pixel
            least = (0, 0)
    try:
        decoded = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except ValueError:
        return None
    pixels = _upright(decoded, jpeg.orientation)
    if crop is None:
        return pixels
    if pixels.shape[:2] == upright:
        left, top, right, bottom = crop
        return pixels[top:bottom, left:right]
    return _cut(pixels, crop, upright)


def _cut(
    pixels: UInt8[np.ndarray, "h w 3"], crop: tuple[int, int, int, int], size: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Cut a box, given in pixels of the full image, out of one that was decoded smaller.

    The edges then fall between pixels. Rounding them would shift the view by up to half a pixel, so the cut-out is
    resampled from the exact edges.
    """
    down, across = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
    left, top, right, bottom = crop
    edges = (left * across, top * down, right * across, bottom * down)
    if all(edge == int(edge) for edge in edges):
        left, top, right, bottom = (int(edge) for edge in edges)
        return pixels[top:bottom, left:right]
    shape = (math.ceil(edges[2] - edges[0]), math.ceil(edges[3] - edges[1]))
    return np.array(Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC, box=edges))


def _upright(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "H W 3"]:
    if orientation == 1:
        return pixels
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    # The mirrorings left to do once 5 to 8 are transposed: EXIF 2.32, section 4.6.5.
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _read_pillow(
    data: bytes, path: str | Path, box: Sequence[float] | None, padding: float
) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of MAX_PIXELS and refuses at MAX_PIXELS; one limit is enough.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        _refuse_bomb(path, image.height, image.width)
        image = ImageOps.exif_transpose(image)
        crop = None if box is None else pixel_box(box, (image.height, image.width), padding=padding, name=path)
        return np.array(_rgb(image if crop is None else image.crop(crop)))
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; make it smaller, drop its row, or set on_error=skip") from error
    except Exception as error:  # on a broken file Pillow raises what its parsers happen to meet
        raise _unreadable(path, data, error) from error


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, over white where it is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255 instead of scaling
        wide = np.asarray(image).astype(np.int64)
        scaled = (wide + 128) // 257 if wide.max() > 255 else wide
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range; save it with 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
