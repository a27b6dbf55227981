"""Convert the pixels of any picture to a square uint8 array of a given resolution and number of channels."""

from __future__ import annotations

import io
import struct
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


# What Pillow raises for broken files and for broken EXIF, by the format and the place of the damage.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error)


def decode(content: bytes, where: str) -> Image.Image:
    """An opaque 8-bit RGB or grey picture from the bytes of an image file; UserError with `where` for anything else."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content))
        # An MPO holds the photo first, then views of it.
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
        picture.load()
    except (*_BROKEN, Image.DecompressionBombError) as error:
        unrecognised = isinstance(error, UnidentifiedImageError)  # its text shows the buffer's address
        reason = "" if unrecognised else f" ({error})"
        if content.startswith(b"version https://git-lfs"):
            raise UserError(f"{where}: a Git LFS pointer, not the image itself; run: git lfs pull") from error
        if kind := _other_kind(content):
            raise UserError(f"{where}: {kind} is not read; convert it, for example to PNG") from error
        raise UserError(f"{where}: not an image, or corrupt{reason}") from error
    if frames > 1:
        raise UserError(f"{where}: holds {frames:,} images; allowed: one in each file, so split it")
    picture = _upright(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        raise UserError(
            f"{where}: more than 8 bits per channel (mode {picture.mode}); allowed: 8-bit grey or colour"
        )
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise UserError(f"{where}: has transparent pixels; put it on a background first")
    return picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")


def _other_kind(content: bytes) -> str | None:
    """The kind of a file that holds images in a form that Pillow does not read; None if it is not known."""
    if content[128:132] == b"DICM":
        return "DICOM"
    return "HEIC" if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1") else None


def _upright(picture: Image.Image) -> Image.Image:
    """The picture rotated according to its EXIF orientation; unchanged if EXIF is malformed, as in viewers."""
    from PIL import ExifTags, Image

    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except _BROKEN:
        return picture
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)  # fmt: skip
    return picture if turn is None else picture.transpose(turn)


def square_array(picture: Image.Image, resolution: int, channels: int) -> np.ndarray:
    """(C, R, R) uint8: cropped to the central square, resized with Lanczos, channels converted."""
    from PIL import Image

    if picture.size != (resolution, resolution):
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return to_channels(array[None], channels)[0]


def to_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """(N, C, H, W) uint8 with 1 or 3 channels -> `channels`; grey as PIL's "L" computes it (ITU-R 601-2)."""
    have = images.shape[1]
    if have == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=1)
    red, green, blue = (images[:, index].astype(np.uint32) for index in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[:, None]


def resized(images: np.ndarray, resolution: int) -> np.ndarray:
    """(N, C, H, H) uint8 -> (N, C, R, R), bilinear with antialiasing as torchvision's Resize of a PIL image."""
    from PIL import Image

    count, channels, side, _ = images.shape
    if side == resolution:
        return images
    output = np.empty((count, channels, resolution, resolution), np.uint8)
    for index in np.ndindex(count, channels):
        plane = Image.fromarray(images[index])
        output[index] = np.asarray(plane.resize((resolution, resolution), Image.Resampling.BILINEAR))
    return output


COLOURS = {1: "grey", 3: "colour"}
_WEIGHTS = {1: " (0.299 red + 0.587 green + 0.114 blue)", 3: ""}


def conversion_notes(forms: Counter, resolution: int, channels: int) -> list[str]:
    """Notes on how images of these forms were converted to one size and one number of channels."""
    sizes: Counter = Counter()
    for (width, height, _), count in forms.items():
        sizes[width, height] += count
    notes = [_sizes_note(sizes, resolution)]
    converted = sum(count for (_, _, own), count in forms.items() if own != channels)
    if converted:
        before, after = COLOURS[4 - channels], COLOURS[channels] + _WEIGHTS[channels]
        notes.append(f"{before} images are converted to {after}: {converted:,} of {forms.total():,}")
    return [note for note in notes if note is not None]


def _sizes_note(sizes: Counter, resolution: int) -> str | None:
    """A note on how images of other or mixed sizes were resized; None if no image was resized."""
    if set(sizes) <= {(resolution, resolution)}:
        return None
    most = sizes.most_common(4)
    listed = ", ".join(f"{width}x{height}: {count:,}" for (width, height), count in most)
    more = f" and {len(sizes) - len(most)} more sizes" if len(sizes) > len(most) else ""
    kinds = f"mixed image sizes ({listed}{more})" if len(sizes) > 1 else f"images of {listed.split(':')[0]}"
    sides = {side for size in sizes for side in size}
    smaller = len(sides) == 1 and max(sides) < resolution
    hint = f" (--resolution {max(sides)} keeps them as they are)" if smaller else ""
    return f"{kinds}: cropped to the central square and resized to {resolution}x{resolution}{hint}"
