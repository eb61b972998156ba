"""Decoding: a file of pixels becomes an upright RGB tensor of bytes, cut to its box.

A JPEG may be decoded at a half, a quarter or an eighth of its size (its cosine transform is cut short, which costs less
than decoding it whole), as long as what remains is at least `OVERSAMPLING` times as large as the caller needs. After
the resize that follows, such an image differs from the full decode by as little as rounding to bytes does (0.4 of 255
levels), *provided* that its edges are kept exact: 1199 pixels halved are 599.5, not 600, and the half pixel that this
shifts the far edge by costs ten times as much cosine. So `decode` returns the exact edges with the pixels.

An image may lie inside an uncompressed tar. Its path then ends in the place: `shard.tar/cat/0001.jpg#1536+20311` are
20,311 bytes from byte 1536 of `shard.tar` on. Here, in `read_bytes`, is the one place that knows.

Letters: H, W height and width in pixels, after the rotation that EXIF asks for; h, w those of the pixels in memory.
"""

from __future__ import annotations

import io
import math
import os
import posixpath
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from vicinal.types import InputError

__all__ = [
    "IN_TAR",
    "MAX_PIXELS",
    "OVERSAMPLING",
    "Cutout",
    "Member",
    "decode",
    "decode_bytes",
    "image_size",
    "pixel_box",
    "read_bytes",
    "read_image",
]

MAX_PIXELS: Final = 178_956_970
"""Larger images are refused before they are decoded. The number at which Pillow refuses, too: 0.5 GB of RGB bytes."""

OVERSAMPLING: Final = 2
"""How many times larger than needed a JPEG stays when it is decoded at a fraction of its size."""

IN_TAR: Final = r"^(.*\.tar)[/\\](.+)#([0-9]+)\+([0-9]+)$"
"""The path of a file inside a tar: that of the tar, the file's name there, its first byte, and how many there are."""

_TAR_BLOCK: Final = 512
_BINARY: Final = getattr(os, "O_BINARY", 0)  # Windows alone has it, and needs it

# The EXIF orientations (1 is upright) that exchange height and width, and those that mirror left and right, or top and
# bottom, once that is done. EXIF 2.32, section 4.6.5.
_SIDEWAYS: Final = frozenset({5, 6, 7, 8})
_MIRRORED_X: Final = frozenset({2, 3, 6, 7})
_MIRRORED_Y: Final = frozenset({3, 4, 7, 8})
_EXIF_ORIENTATION: Final = 0x0112
_MODES: Final = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


class Member(NamedTuple):
    """A file inside an uncompressed tar.

    Args:
        tar: the path of the tar.
        name: the file's name there, without a leading `./`.
        offset: of its first byte in the tar.
        size: in bytes.

    >>> Member.of("shards/a.tar/0001.jpg#1536+20311")
    Member(tar='shards/a.tar', name='0001.jpg', offset=1536, size=20311)
    >>> Member("a.tar", "0001.jpg", 1536, 20311).path
    'a.tar/0001.jpg#1536+20311'
    >>> Member.of("photos/0001.jpg") is None
    True
    """

    tar: str
    name: str
    offset: int
    size: int

    @classmethod
    def of(cls, path: str | Path) -> Member | None:
        """The member that a path names; None for an ordinary path."""
        text = str(path)
        if ".tar" not in text or (found := _PLACE.match(text)) is None:
            return None
        tar, name, offset, size = found.groups()
        return cls(tar, name, int(offset), int(size))

    @property
    def path(self) -> str:
        """The path that `of` takes apart."""
        return f"{self.tar}/{self.name}#{self.offset}+{self.size}"

    def read(self, count: int = -1) -> bytes:
        """Its first `count` bytes, -1: all.

        Raises:
            OSError: the tar is not there.
            InputError: what lies at this place is not this file: the tar was written anew since.
        """
        wanted = self.size if count < 0 else min(count, self.size)
        handle = os.open(self.tar, os.O_RDONLY | _BINARY)  # a file object would take longer than the reading
        try:
            os.lseek(handle, self.offset - _TAR_BLOCK, os.SEEK_SET)
            data = os.read(handle, _TAR_BLOCK + wanted)
            while len(data) < _TAR_BLOCK + wanted and (more := os.read(handle, _TAR_BLOCK + wanted - len(data))):
                data += more  # a read may stop short, on network drives and after 2 GB
        finally:
            os.close(handle)
        if len(data) < _TAR_BLOCK + wanted or not self._headed_by(data[:_TAR_BLOCK]):
            raise InputError(
                f"{self.path}: {self.tar} was written anew or cut since it was read; read the shards again"
            )
        return data[_TAR_BLOCK:]

    def _headed_by(self, header: bytes) -> bool:
        """Whether the header before the bytes is this file's, as far as it tells (long names stand elsewhere)."""
        size, name = header[124:135], header[:100].split(b"\0", 1)[0]
        if size.isdigit() and int(size, 8) != self.size:
            return False
        if len(name) >= 99 or not self.name.isascii():
            return True
        return posixpath.basename(name.decode("utf-8", "replace")) == posixpath.basename(self.name.replace("\\", "/"))


_PLACE: Final = re.compile(IN_TAR)


class Cutout(NamedTuple):
    """An image or the box of one, perhaps decoded smaller than the file says.

    Args:
        pixels: what is in memory. It may reach up to a pixel beyond the edges.
        size: H, W of the cut-out in the file.
        edges: left, top, right, bottom of the cut-out in `pixels`; they fall between pixels where it was scaled.
    """

    pixels: UInt8[Tensor, "3 h w"]
    size: tuple[int, int]
    edges: tuple[float, float, float, float]

    @classmethod
    def whole(cls, pixels: UInt8[Tensor, "3 H W"]) -> Cutout:
        """All of an image.

        >>> Cutout.whole(torch.zeros(3, 4, 5, dtype=torch.uint8)).edges
        (0.0, 0.0, 5.0, 4.0)
        """
        height, width = pixels.shape[1:]
        return cls(pixels, (height, width), (0.0, 0.0, float(width), float(height)))

    def resized(self, size: tuple[int, int], interpolation: Literal["bilinear", "bicubic"]) -> UInt8[Tensor, "3 a b"]:
        """The cut-out in another size, from its exact edges; antialiased.

        Args:
            size: height and width of the result.
            interpolation: "bilinear" or "bicubic".
        """
        left, top, right, bottom = self.edges
        height, width = self.pixels.shape[1:]
        whole = self.edges == (0, 0, width, height)
        if whole and size == (height, width):
            return self.pixels
        # One pixel wide, channels-last and planar are the same to torch, and its fast resize stops with an assertion.
        if min(height, width, *size) > 1:
            if whole:
                full: Tensor = tv.resize_image(self.pixels, list(size), _MODES[interpolation], antialias=True)
                return full
            if left == top == 0 and bottom >= size[0] and right >= size[1]:
                # Only the far edges are fractions: the ratio of the lengths is given instead of that of the pixels.
                strided = self.pixels.as_strided((1, 3, height, width), (self.pixels.numel(), *self.pixels.stride()))
                ratio = (size[0] / bottom, size[1] / right)
                out = F.interpolate(
                    strided, scale_factor=ratio, mode=interpolation, antialias=True, recompute_scale_factor=False
                )
                return out[0, :, : size[0], : size[1]]
        array = self.pixels.permute(1, 2, 0).numpy()
        mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
        resized = Image.fromarray(array).resize((size[1], size[0]), mode, box=self.edges)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    def rounded(self) -> UInt8[Tensor, "3 a b"]:
        """The pixels between the edges, these rounded to whole pixels: a view up to half a pixel off, at no cost."""
        left, top, right, bottom = (round(edge) for edge in self.edges)
        return self.pixels[:, top:bottom, left:right]


def decode(
    path: str | Path,
    *,
    box: Sequence[float | int] | None = None,
    padding: float = 0.0,
    at_least: tuple[int, int] | None = None,
) -> Cutout:
    """Decode an image file: upright, cut to its box, RGB, perhaps at a fraction of its size.

    Transparent pixels are laid over white; palettes, grey, 1-bit, 16-bit grey and CMYK become 8-bit RGB; of an
    animation the first frame is taken. Colour profiles are ignored, as the pipelines of the pretrained models do.
    The tensor is channels-last in memory (what the decoder wrote, not copied), the form that resizing is fastest on.

    Args:
        path: of a JPEG, PNG, WebP, GIF, BMP, TIFF or another file that Pillow reads.
        box: x0, y0, x1, y1 in pixels of the upright image; None for the whole of it. See `pixel_box` for fractions.
        padding: how much the box is widened on every side, as a share of its longer side. It ends where the image does.
        at_least: height and width that the caller will resize to. The pixels may then be fewer than the file has,
            but not fewer than twice this on either side. None: every pixel.

    Raises:
        InputError: the file is missing, is no image, is cut short, has more than `MAX_PIXELS` pixels, or does not hold
            the box. The message names the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (1000, 801)).save(f"{folder}/photo.jpg")
    ...     photo = decode(f"{folder}/photo.jpg", at_least=(100, 100))
    >>> photo.size, tuple(photo.pixels.shape), photo.edges
    ((801, 1000), (3, 201, 250), (0.0, 0.0, 250.0, 200.25))
    """
    return decode_bytes(read_bytes(path), path, box=box, padding=padding, at_least=at_least)


def decode_bytes(
    data: bytes,
    path: str | Path,
    *,
    box: Sequence[float | int] | None = None,
    padding: float = 0.0,
    at_least: tuple[int, int] | None = None,
) -> Cutout:
    """Decode what `decode` would have read; `path` is what errors call it."""
    jpeg = _jpeg_header(data)
    found = None if jpeg is None else _decode_jpeg(data, jpeg, path, box, padding, at_least)
    return found or _decode_pillow(data, path, box, padding)


def read_image(
    path: str | Path,
    *,
    box: Sequence[float | int] | None = None,
    padding: float = 0.0,
    at_least: tuple[int, int] | None = None,
) -> UInt8[Tensor, "3 H W"]:
    """The pixels of an image file: upright, cut to its box, RGB. Arguments and errors are those of `decode`.

    Where `at_least` led to a smaller decode whose edges fall between pixels, it is resampled to whole ones.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (40, 30), 255).save(f"{folder}/grey.png")
    ...     read_image(f"{folder}/grey.png", box=(10, 0, 20, 30)).shape
    torch.Size([3, 30, 10])
    """
    cutout = decode(path, box=box, padding=padding, at_least=at_least)
    left, top, right, bottom = cutout.edges
    return cutout.resized((max(round(bottom - top), 1), max(round(right - left), 1)), "bicubic")


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
    head = read_bytes(path, 1 << 16)
    # The size stands behind the EXIF block, which may hold a thumbnail of 64 kB.
    jpeg = _jpeg_header(head) or (_jpeg_header(read_bytes(path)) if head[:2] == b"\xff\xd8" else None)
    if jpeg is not None:
        height, width, sideways = jpeg.height, jpeg.width, jpeg.orientation in _SIDEWAYS
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(read_bytes(path))) as image:
                    width, height = image.size
                    sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
        except Exception as error:  # on a broken header Pillow raises what its parsers happen to meet
            raise _unreadable(path, head, error) from error
    return (width, height) if sideways else (height, width)


def pixel_box(
    box: Sequence[float | int], size: tuple[int, int], *, padding: float = 0.0, name: str | Path = "the image"
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


def read_bytes(path: str | Path, count: int = -1) -> bytes:
    """The bytes of an image file, wherever it lies: on the disk, or inside a tar (see `Member`).

    Args:
        path: of the file.
        count: how many, from the first on; -1: all.

    Raises:
        InputError: it is not there.

    >>> import tarfile, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with tarfile.open(f"{folder}/a.tar", "w") as tar:
    ...         note = tarfile.TarInfo("note.txt")
    ...         note.size = 5
    ...         tar.addfile(note, io.BytesIO(b"hello"))
    ...     read_bytes(f"{folder}/a.tar/note.txt#512+5")
    b'hello'
    """
    try:
        member = Member.of(path)
        if member is not None:
            return member.read(count)
        with open(path, "rb") as file:  # noqa: PTH123  (half the time of Path.open, and this is once an image)
            return file.read(count)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(
            f"{path}: {reason}; mend the path in the table (relative paths start at the table's root), "
            "or set on_error=skip"
        ) from error


def _unreadable(path: str | Path, data: bytes, error: Exception) -> InputError:
    if not data:
        reason = "the file is empty"
    elif isinstance(error, UnidentifiedImageError):
        reason = "this is no image in a format that can be read (HEIC, AVIF or SVG: convert it to JPEG or PNG)"
    else:
        reason = f"the image cannot be decoded: {error}"
    return InputError(f"{path}: {reason}; replace the file, drop its row, or set on_error=skip")


def _bomb(path: str | Path, pixels: str) -> InputError:
    return InputError(
        f"{path}: {pixels} pixels are more than the limit of {MAX_PIXELS:,} (a decompression bomb, or a scan that "
        "should be tiled); make it smaller, drop its row, or set on_error=skip"
    )


def _refuse_bomb(path: str | Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise _bomb(path, f"{width:,} x {height:,}")


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


def _decode_jpeg(
    data: bytes,
    jpeg: _Jpeg,
    path: str | Path,
    box: Sequence[float | int] | None,
    padding: float,
    at_least: tuple[int, int] | None,
) -> Cutout | None:
    """The fast path. None where the decoder meets something odd: Pillow is then asked, and words the error."""
    if jpeg.components not in (1, 3):
        return None
    _refuse_bomb(path, jpeg.height, jpeg.width)
    sideways = jpeg.orientation in _SIDEWAYS
    upright = (jpeg.width, jpeg.height) if sideways else (jpeg.height, jpeg.width)
    crop = (0, 0, upright[1], upright[0]) if box is None else pixel_box(box, upright, padding=padding, name=path)
    left, top, right, bottom = crop
    size = (bottom - top, right - left)
    part = 8 if at_least is None else _eighths(size, at_least)
    # The decoder takes the smallest fraction that measures this; without a fraction, nothing is asked for.
    least = (0, 0) if part == 8 else (-(-jpeg.height * part // 8), -(-jpeg.width * part // 8))
    try:
        decoded = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except ValueError:
        return None
    pixels = _upright(decoded, jpeg.orientation)
    # The decoder rounds up to whole pixels at the far edges as they are stored. Mirrored, those are near edges.
    spare_y, spare_x = (have - full * part / 8 for have, full in zip(pixels.shape, upright, strict=False))
    x = part / 8, spare_x if jpeg.orientation in _MIRRORED_X else 0.0
    y = part / 8, spare_y if jpeg.orientation in _MIRRORED_Y else 0.0
    edges = (left * x[0] + x[1], top * y[0] + y[1], right * x[0] + x[1], bottom * y[0] + y[1])
    return _trimmed(pixels, size, edges)


def _eighths(size: tuple[int, int], at_least: tuple[int, int]) -> int:
    """The fewest of 1, 2, 4, 8 eighths that keep `size` OVERSAMPLING times `at_least`; others decode slower."""
    share = max(OVERSAMPLING * need / have for need, have in zip(at_least, size, strict=True))
    return next((part for part in (1, 2, 4) if part / 8 >= share), 8)


def _trimmed(
    pixels: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], edges: tuple[float, float, float, float]
) -> Cutout:
    """Without the pixels that lie wholly outside the edges (they are freed: a box may be small in a large photo)."""
    left, top, right, bottom = edges
    x, y = math.floor(left), math.floor(top)
    pixels = np.ascontiguousarray(pixels[y : math.ceil(bottom), x : math.ceil(right)])
    return Cutout(torch.from_numpy(pixels).permute(2, 0, 1), size, (left - x, top - y, right - x, bottom - y))


def _upright(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "H W 3"]:
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in _MIRRORED_X:
        pixels = pixels[:, ::-1]
    if orientation in _MIRRORED_Y:
        pixels = pixels[::-1]
    return pixels


def _decode_pillow(data: bytes, path: str | Path, box: Sequence[float | int] | None, padding: float) -> Cutout:
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of MAX_PIXELS and refuses at MAX_PIXELS; one limit is enough.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
        _refuse_bomb(path, opened.height, opened.width)
        image = ImageOps.exif_transpose(opened)
        crop = None if box is None else pixel_box(box, (image.height, image.width), padding=padding, name=path)
        pixels = np.array(_rgb(image if crop is None else image.crop(crop)))
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _bomb(path, "its") from error  # beyond Pillow's own limit, which is ours unless the user changed it
    except Exception as error:  # on a broken file Pillow raises what its parsers happen to meet
        raise _unreadable(path, data, error) from error
    return Cutout.whole(torch.from_numpy(pixels).permute(2, 0, 1))


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
