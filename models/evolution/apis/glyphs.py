"""Rendered characters as an image generator: a simulator that needs no weights, for pictures of digits or letters.

Random images are characters in a random font, size, stretch, turn, slant and stroke; the private class has no say, so
that it is the votes that give a class its character. Variations change each attribute a little, as the text renderer
of the Private Evolution library does (Lin et al. 2025, "Differentially private synthetic data via APIs 3").

Every character is kept as a signed distance to its outline (Green 2007, "Improved alpha-tested magnification"), so that
a stroke of any thickness at any place is one lookup per pixel. Legend: N images, S samples per side of an outline.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from data.glyphs import FONT_NAMES, character_mask, load_fonts
from data.spec import DataSpec
from models.evolution.apis.api import Candidates, ImageAPI
from utils.errors import UserError
from utils.runtime import Runtime
from utils.sections import check_field
from utils.seeding import numpy_rng
from utils.timing import seconds_of

if TYPE_CHECKING:
    from PIL import Image

# Ranges that attributes are drawn from and stay in. Lengths are shares of the image side, or of the character's height.
RANGES = {
    "size": (0.4, 1.0),  # height
    "stretch": (0.6, 1.3),  # horizontal scale, 1 being the font's own
    "angle": (-30.0, 30.0),  # degrees
    "slant": (-0.3, 0.6),  # horizontal displacement per unit of height
    "stroke": (-0.03, 0.07),  # thickness added on each side of a stroke
}
SAMPLES = 32  # of an outline, per height of its character
FINER = 4  # bitmaps that distances are measured in have this many pixels per sample
FIELD = 1.5  # side of an outline's square, in heights of its character
WIDEST = 1.2  # heights; wider letters are squeezed
AT_ONCE = 1000  # images rendered together
LEAST_PIXELS = 16  # per side; smaller images are rendered at this size, then averaged
GLYPH, POSE = "glyph", "pose"  # rows of Candidates.info: (character, font) and the values of RANGES


@dataclass(frozen=True)
class GlyphsConfig:
    """The lists say how much a variation changes, one entry per degree: degree 0 is the first."""

    characters: str  # what is drawn, each equally often
    new_character: list[float]  # probability of another character
    new_font: list[float]  # probability of another font
    size: list[float]  # largest change, as a share of the image side
    stretch: list[float]  # largest change
    angle: list[float]  # largest change, degrees
    slant: list[float]  # largest change
    stroke: list[float]  # largest change, as a share of the height

    def __post_init__(self) -> None:
        known = bool(self.characters) and self.characters.isprintable() and " " not in self.characters
        check_field(known, "characters", repr(self.characters), "a text without spaces")
        for name in ("new_character", "new_font", *RANGES):
            values = getattr(self, name)
            right_length = f"a list as long as new_character, {self.num_degrees}"
            check_field(len(values) == self.num_degrees, name, values, right_length)
            most = 1.0 if name.startswith("new_") else np.inf
            allowed = "in [0, 1]" if name.startswith("new_") else "0 or more"
            check_field(all(0 <= value <= most for value in values), name, values, allowed)

    @property
    def num_degrees(self) -> int:
        return len(self.new_character)


class GlyphsAPI(ImageAPI):
    """Characters by their outlines. The degree of a variation is an index into the lists of the settings."""

    Config = GlyphsConfig

    def __init__(self, config: GlyphsConfig, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        self._num_glyphs = np.array([len(config.characters), len(FONT_NAMES)])
        self._low, self._high = np.array(list(RANGES.values()), np.float32).T

    def check_degree(self, degree: float) -> None:
        if degree not in range(self.config.num_degrees):
            allowed = f"a whole number from 0 to {self.config.num_degrees - 1}, an index into its lists"
            raise UserError(f"{degree:g} is not allowed for api glyphs; it must be {allowed}")

    def random_api(self, labels: np.ndarray, rng_name: str) -> Candidates:
        rng = numpy_rng(self.runtime.seed, rng_name)
        glyphs = rng.integers(self._num_glyphs, size=(len(labels), 2))
        poses = rng.uniform(self._low, self._high, (len(labels), len(RANGES))).astype(np.float32)
        return self._candidates(labels, glyphs, poses)

    def variation_api(self, candidates: Candidates, degree: float, rng_name: str) -> Candidates:
        rng = numpy_rng(self.runtime.seed, rng_name)
        config, row, count = self.config, int(degree), len(candidates)
        changes = rng.random((count, 2)) < [config.new_character[row], config.new_font[row]]
        others = rng.integers(self._num_glyphs, size=(count, 2))
        glyphs = np.where(changes, others, candidates.info[GLYPH])
        largest = np.array([getattr(config, name)[row] for name in RANGES])
        moved = candidates.info[POSE] + rng.uniform(-largest, largest, (count, len(RANGES)))
        poses = np.clip(moved, self._low, self._high).astype(np.float32)
        return self._candidates(candidates.labels, glyphs, poses)

    def seconds_per_image(self) -> float:
        labels = np.zeros(AT_ONCE, np.int64)
        return seconds_of(lambda: self.random_api(labels, "seconds")) / AT_ONCE

    def _candidates(self, labels: np.ndarray, glyphs: np.ndarray, poses: np.ndarray) -> Candidates:
        outlines = self._outlines()
        images = np.empty((len(labels), *self.image_shape), np.uint8)
        for start in range(0, len(labels), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            chosen = outlines[torch.from_numpy(glyphs[part] @ [len(FONT_NAMES), 1]).to(outlines.device)]
            pose = torch.from_numpy(poses[part]).to(outlines.device)
            images[part] = render(chosen, pose, self.spec.resolution).cpu().numpy()[:, None]
        return Candidates(images, labels, {GLYPH: glyphs, POSE: poses})

    def _outlines(self) -> torch.Tensor:
        """(characters x fonts, S, S) float32 on the run's device."""
        return outlines(self.config.characters).to(self.runtime.device)


def render(outlines: torch.Tensor, poses: torch.Tensor, resolution: int) -> torch.Tensor:
    """Outlines (N, S, S), poses (N, 5) in the order of RANGES -> (N, resolution, resolution) uint8, white on black."""
    size, stretch, angle, slant, stroke = poses.unbind(1)
    cosine, sine = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    # From a pixel of the image, in [-1, 1], back to the character: turn, then slant, then scale.
    across = torch.stack([cosine + slant * sine, sine - slant * cosine], 1) / stretch[:, None]
    inverse = torch.stack([across, torch.stack([-sine, cosine], 1)], 1) / (size * FIELD)[:, None, None]
    transform = torch.cat([inverse, torch.zeros_like(inverse[:, :, :1])], 2)
    factor = -(-LEAST_PIXELS // resolution)
    side = resolution * factor
    grid = F.affine_grid(transform, (len(poses), 1, side, side), align_corners=False)
    distance = F.grid_sample(outlines[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    # Distances are in heights of the character; a pixel half covered lies on the outline.
    pixels = (distance + stroke[:, None, None]) * (size * side)[:, None, None]
    return F.avg_pool2d((pixels + 0.5).clamp(0, 1), factor).mul(255).round().byte()


@functools.cache
def outlines(characters: str) -> torch.Tensor:
    """(characters x fonts, S, S) float32: distance to the outline in heights of the character, positive inside."""
    fonts = load_fonts()
    fields = [_distance(character_mask(font, character)) for character in characters for font in fonts]
    return torch.from_numpy(np.stack(fields))


def _distance(mask: "Image.Image") -> np.ndarray:
    """The signed distance field of a grey PIL image that is cropped to its ink."""
    from scipy.ndimage import distance_transform_edt

    height, side = SAMPLES * FINER, round(FIELD * SAMPLES) * FINER
    width = max(1, round(min(mask.width / mask.height, WIDEST) * height))
    top, left = (side - height) // 2, (side - width) // 2
    ink = np.zeros((side, side), bool)
    ink[top : top + height, left : left + width] = np.asarray(mask.resize((width, height))) >= 128
    signed = np.where(ink, distance_transform_edt(ink) - 0.5, 0.5 - distance_transform_edt(~ink)) / height
    return signed.reshape(side // FINER, FINER, side // FINER, FINER).mean((1, 3)).astype(np.float32)
