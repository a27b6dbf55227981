"""Public letters and digits: 62 classes rendered from the fonts that matplotlib ships, without a download.

Each image is one character in a random font, turned, sheared, scaled, shifted, and made thicker or thinner, as a
black-and-white bitmap four times as large (twice above 32 px), which is then averaged over blocks. scikit-learn's 8x8
digits were made from 32x32 bitmaps of handwriting in the same way.
"""

import hashlib
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.spec import PublicData, Samples
from utils.errors import UserError
from utils.progress import progress
from utils.seeding import numpy_rng

if TYPE_CHECKING:
    from PIL import Image, ImageFont

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
DEFAULT_PER_CLASS = 300
RENDERER_VERSION = 1  # increase it when the pictures change: it is part of the cache key
# Text fonts of matplotlib whose strokes are of nearly even thickness, like a pen's. Left out: symbols, size
# variants, bold serifs, and DejaVu Sans Mono, whose zero has a stroke inside.
FONT_NAMES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Italic")),
    *(f"STIXGeneral{style}" for style in ("", "Italic")),
    *("cmr10", "cmss10", "cmtt10"),
)
FONT_SIZE = 96  # pixels; about the height of the largest bitmap that is commonly made from a mask
OUTLINE = 1  # pixel added around every stroke, so that hairlines survive the threshold

# Below this the character fills the box, as in scikit-learn's digits; from it on it leaves a margin, as in MNIST.
MARGIN_FROM_RESOLUTION = 16
HEIGHT_WITHOUT_MARGIN = 0.98  # height of the character as a share of the box
HEIGHT_WITH_MARGIN = 0.72
INK_WITHOUT_MARGIN = 0.32  # ink area as a share of (character height)^2, measured on scikit-learn's digits
INK_WITH_MARGIN = 0.26  # measured on MNIST
WIDEST = 0.72  # width at most, as a share of the height; wider letters are squeezed
THRESHOLDS = (0.1, 0.65)  # of the blurred bitmap; beyond them strokes melt together or break


@dataclass(frozen=True)
class Pose:
    """How one character lies in the box. Lengths are shares of the box side, angles in radians."""

    height: float
    stretch: float  # horizontal scale relative to the font's own proportions
    angle: float
    shear: float  # horizontal displacement per unit of height
    shift_x: float
    shift_y: float
    ink: float  # target ink area, as a share of the box area


def render(resolution: int, per_class: int = DEFAULT_PER_CLASS, seed: int = 0) -> PublicData:
    """`per_class` grey images of each of the 62 characters, white on black, ordered by class.

    Deterministic in (resolution, per_class, seed) for one version of matplotlib's fonts and of Pillow.
    """
    if resolution < 4 or per_class < 1:
        raise UserError(
            f"glyphs: {per_class} images per class at {resolution} px; allowed: at least 1 at 4 px or more"
        )
    fonts = load_fonts()
    images = np.empty((len(CHARACTERS) * per_class, 1, resolution, resolution), np.uint8)
    for label, character in enumerate(progress(CHARACTERS, "rendering glyphs", unit="class")):
        masks = [character_mask(font, character) for font in fonts]
        rng = numpy_rng(seed, f"glyph {character}")
        for index in range(per_class):
            mask = masks[rng.integers(len(masks))]
            images[label * per_class + index, 0] = _draw(mask, _random_pose(rng, resolution), resolution)
    labels = np.repeat(np.arange(len(CHARACTERS)), per_class)
    return PublicData("glyphs", Samples(images, labels.astype(np.int64)), tuple(CHARACTERS))


def rendering_key(resolution: int, per_class: int, seed: int) -> str:
    """A cache key that covers everything that the pictures depend on: arguments, this code, fonts, Pillow."""
    import PIL

    digest = hashlib.sha256(repr((resolution, per_class, seed, RENDERER_VERSION, PIL.__version__)).encode())
    for path in font_paths():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def font_paths() -> list[Path]:
    """The font files, in a fixed order; UserError if one is missing from matplotlib."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [folder / f"{name}.ttf" for name in FONT_NAMES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"glyphs: {', '.join(missing)} missing in {folder}; reinstall matplotlib")
    return paths


def load_fonts() -> list:
    """The fonts as Pillow objects of FONT_SIZE, in the order of FONT_NAMES."""
    from PIL import ImageFont

    # The basic layout engine gives the same pictures whether or not Pillow was built with Raqm.
    return [
        ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for path in font_paths()
    ]


def character_mask(font: "ImageFont.FreeTypeFont", character: str) -> "Image.Image":
    """The character as a grey PIL image, cropped to its ink."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (3 * FONT_SIZE, 3 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE, FONT_SIZE), character, fill=255, font=font, stroke_width=OUTLINE)
    return canvas.crop(canvas.getbbox())


def _random_pose(rng: np.random.Generator, resolution: int) -> Pose:
    margin = resolution >= MARGIN_FROM_RESOLUTION
    height = (HEIGHT_WITH_MARGIN if margin else HEIGHT_WITHOUT_MARGIN) * rng.uniform(0.9, 1.08)
    ink = (INK_WITH_MARGIN if margin else INK_WITHOUT_MARGIN) * rng.uniform(0.75, 1.25)
    return Pose(
        height=height,
        stretch=rng.uniform(0.8, 1.15),
        angle=np.deg2rad(rng.uniform(-12, 12)),
        shear=rng.uniform(-0.1, 0.25),
        shift_x=rng.uniform(-0.06, 0.06),
        shift_y=rng.uniform(-0.03, 0.03),
        ink=ink * height**2,
    )


def _draw(mask: "Image.Image", pose: Pose, resolution: int) -> np.ndarray:
    """(resolution, resolution) uint8: the mask in its pose as a bitmap, averaged over blocks."""
    from PIL import Image, ImageFilter

    block = 4 if resolution <= 32 else 2
    side = resolution * block
    coefficients = _box_to_mask(mask.size, pose, side)
    bitmap = mask.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    # Blur, then threshold: rounds corners like a pen, and the threshold that gives the target ink sets the thickness.
    blurred = np.asarray(bitmap.filter(ImageFilter.GaussianBlur(pose.height * side / 32)))
    threshold = np.clip(np.quantile(blurred, 1 - pose.ink), *(255 * share for share in THRESHOLDS))
    ink = (blurred > threshold).reshape(resolution, block, resolution, block)
    return np.round(ink.mean((1, 3)) * 255).astype(np.uint8)


def _box_to_mask(mask_size: tuple[int, int], pose: Pose, side: int) -> tuple[float, ...]:
    """The six coefficients by which PIL finds the mask's pixel for a pixel of the box (inverse of the pose)."""
    width, height = mask_size
    scale_y = pose.height * side / height
    scale_x = min(scale_y * pose.stretch, WIDEST * pose.height * side / width)
    cosine, sine = np.cos(pose.angle), np.sin(pose.angle)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    slant = np.array([[1.0, -pose.shear], [0.0, 1.0]])
    inverse = np.linalg.inv(turn @ slant @ np.diag([scale_x, scale_y]))
    centre_of_box = side * np.array([0.5 + pose.shift_x, 0.5 + pose.shift_y])
    offset = np.array([width / 2, height / 2]) - inverse @ centre_of_box
    return (*inverse[0], offset[0], *inverse[1], offset[1])
