"""Drawing for the digits data: cluttered canvases, digits on them, and objects that hide them.

Shapes: a source digit is ``(8, 8)`` in 0..1; a canvas is ``(H, W, 3)`` float32 RGB in 0..255; a
cover is ``(h, w)`` float32 in 0..1, the opacity of one object to paste. ``rng`` is the only source
of randomness. Lengths are pixels of a canvas of 160 x 160 and scaled to other canvases.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Cover = NDArray[np.float32]
Mask = NDArray[np.bool_]

SOURCE_SIDE = 8
REFERENCE_CANVAS = 160
_PLACEMENT_TRIES = 25


class Scene:
    """A canvas, and the visible pixels of every digit on it.

    Args:
        rng: draws everything.
        side: height and width of the canvas in pixels.
        min_visible: share of its pixels that every digit keeps; an object that would hide more is
            not drawn.
    """

    def __init__(self, rng: np.random.Generator, side: int, min_visible: float) -> None:
        self.rng = rng
        self.side = side
        self.unit = side / REFERENCE_CANVAS
        self.min_visible = min_visible
        self.image: Image = background(rng, side)
        self.visible: list[Mask] = []
        self._full_areas: list[int] = []

    def add_digit(self, source: Image, size: float) -> bool:
        """Paste a digit, of ``size`` pixels before rotation; False if there was no place for it."""
        cover = glyph(self.rng, source, size)
        mask = self._paste(lambda: cover)
        if mask is None:
            return False
        self.visible.append(mask)
        self._full_areas.append(int(mask.sum()))
        return True

    def add_distractor(self, source: Image, size: float) -> None:
        """Paste an object that resembles a digit and has no label."""
        rng = self.rng
        covers: list[Callable[[], Cover]] = [
            lambda: glyph(rng, scrambled(rng, source), size),
            lambda: glyph(rng, fragment(rng, source), size),
            lambda: letter_strokes(rng, size),
        ]
        self._paste(covers[rng.integers(3)])

    def add_stroke(self) -> None:
        """Draw a thin line over everything else."""
        for _ in range(_PLACEMENT_TRIES):
            cover = stroke(self.rng, self.side, self.rng.uniform(1.0, 3.0) * self.unit)
            if self._leaves_enough(cover > 0.5):
                self._blend(cover, np.s_[:, :], random_colour(self.rng))
                return

    def finish(self) -> NDArray[np.uint8]:
        """The canvas with a little blur and noise, rounded to ``(H, W, 3)`` uint8."""
        if self.rng.random() < 0.5:
            sigma = self.rng.uniform(0.3, 0.7) * self.unit
            self.image[:] = cv2.GaussianBlur(self.image, (0, 0), sigma)
        noise = self.rng.normal(0.0, self.rng.uniform(2.0, 12.0), self.image.shape)
        # Six bits per channel: the noise hides the difference, and files are a third smaller.
        return (np.clip(np.rint((self.image + noise) / 4), 0, 63) * 4).astype(np.uint8)

    def _paste(self, draw: Callable[[], Cover]) -> Mask | None:
        """Paste where enough of every earlier digit stays visible.

        Returns:
            ``(H, W)``, the covered pixels; None if there was no such place.
        """
        for _ in range(_PLACEMENT_TRIES):
            cover = draw()
            height, width = cover.shape
            if max(height, width) > self.side or not (cover > 0.5).any():
                continue
            top = int(self.rng.integers(self.side - height + 1))
            left = int(self.rng.integers(self.side - width + 1))
            region = np.s_[top : top + height, left : left + width]
            mask = np.zeros((self.side, self.side), dtype=bool)
            mask[region] = cover > 0.5
            if self._leaves_enough(mask):
                colour = contrasting_colour(self.rng, self.image[region].mean(axis=(0, 1)))
                self._blend(cover * self.rng.uniform(0.85, 1.0), region, colour)
                return mask
        return None

    def _leaves_enough(self, mask: Mask) -> bool:
        """Whether every digit stays visible under a mask; if so, its pixels count as hidden."""
        remaining = [visible & ~mask for visible in self.visible]
        for digit, full_area in zip(remaining, self._full_areas, strict=True):
            if digit.sum() < self.min_visible * full_area:
                return False
        self.visible = remaining
        return True

    def _blend(self, cover: Cover, region: Any, colour: NDArray[np.float32]) -> None:
        under = self.image[region]
        self.image[region] = under + cover[..., None] * (colour - under)


def random_colour(rng: np.random.Generator) -> NDArray[np.float32]:
    """``(3,)`` RGB in 0..255."""
    return rng.uniform(0.0, 255.0, 3).astype(np.float32)


def contrasting_colour(
    rng: np.random.Generator, under: NDArray[np.float32], low: float = 60.0, high: float = 230.0
) -> NDArray[np.float32]:
    """A colour at a random Euclidean distance, from ``low`` to ``high``, from the one below it.

    Colours are ``(3,)`` RGB in 0..255; at the edge of the RGB cube the distance may be smaller.
    """
    wanted = rng.uniform(low, high)
    colour = under
    for _ in range(20):
        direction = rng.normal(size=3)
        # Part of the contrast is in brightness, because hue alone is lost in the noise.
        direction += np.sign(direction.sum()) * 0.7
        colour = np.clip(under + wanted * direction / np.linalg.norm(direction), 0, 255)
        if np.linalg.norm(colour - under) >= min(0.8 * wanted, 120.0):
            break
    return colour.astype(np.float32)


def background(rng: np.random.Generator, side: int) -> Image:
    """A colour gradient with texture, blobs and strokes, ``(side, side, 3)``."""
    unit = side / REFERENCE_CANVAS
    base = rng.uniform(40, 215, 3)
    image = _resized(base + rng.normal(0, 35, (*rng.integers(2, 5, 2), 3)), side)
    for cells in (10, 40):
        channels = int(rng.choice([1, 3]))
        image += rng.uniform(0, 14) * _resized(rng.normal(size=(cells, cells, channels)), side)
    for _ in range(rng.integers(2, 7)):
        _blend_in(image, blob(rng, side), random_colour(rng), rng.uniform(0.2, 0.7))
    for _ in range(rng.integers(3, 10)):
        cover = stroke(rng, side, rng.uniform(1.0, 4.0) * unit)
        _blend_in(image, cover, random_colour(rng), rng.uniform(0.3, 0.9))
    return np.clip(image, 0, 255)


def blob(rng: np.random.Generator, side: int) -> Cover:
    """A filled ellipse, ``(side, side)``."""
    canvas = np.zeros((side, side), np.uint8)
    centre = [int(value) for value in rng.integers(0, side, 2)]
    axes = [int(value) for value in rng.uniform(0.03, 0.2, 2) * side + 1]
    cv2.ellipse(canvas, centre, axes, int(rng.integers(180)), 0, 360, 255, -1, cv2.LINE_AA)
    return _opacity(canvas)


def stroke(rng: np.random.Generator, side: int, thickness: float) -> Cover:
    """A bent line between two random points, ``(side, side)``."""
    start, bend, end = rng.uniform(0, side, (3, 2))
    # A stroke over the whole canvas would cut most digits, so some are shortened.
    end = start + (end - start) * rng.uniform(0.3, 1.0)
    return _curve(side, [(start, (start + end + bend) / 3, end)], thickness)


def glyph(rng: np.random.Generator, source: Image, size: float) -> Cover:
    """A source digit up-sampled smoothly, slightly rotated, sheared and stretched; ``(h, w)``.

    ``size`` is the height of the eight rows in pixels. Empty rows and columns are cropped.
    """
    scale = size / SOURCE_SIDE
    angle = np.deg2rad(rng.uniform(-18, 18))
    shear = rng.uniform(-0.15, 0.15)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.array([[scale * rng.uniform(0.85, 1.2), shear * scale], [0.0, scale]])
    matrix = rotation @ stretch
    padded = np.pad(source, 2)
    side = int(np.ceil(size * 1.8)) + 4
    shift = (side - 1) / 2 - matrix @ np.full(2, (len(padded) - 1) / 2)
    affine = np.column_stack([matrix, shift])
    ink = cv2.warpAffine(padded, affine, (side, side), flags=cv2.INTER_CUBIC)
    # The threshold sets the weight of the pen, the gain an edge of about one and a half pixels.
    cover = np.clip((ink - rng.uniform(0.42, 0.6)) * max(1.5, 0.8 * scale) + 0.5, 0, 1)
    return _cropped(cover.astype(np.float32))


def scrambled(rng: np.random.Generator, source: Image) -> Image:
    """The four quarters of a digit in another order; ``(8, 8)``."""
    half = SOURCE_SIDE // 2
    corners = [np.s_[i : i + half, j : j + half] for i in (0, half) for j in (0, half)]
    result = np.empty_like(source)
    # Every quarter moves to the next corner and none is mirrored: a 2 with exchanged halves is a 5,
    # and a 0 of mirrored quarters is a 0 again.
    shift = int(rng.choice([1, 3]))
    for index, corner in enumerate(corners):
        result[corner] = source[corners[(index + shift) % 4]]
    return result


def fragment(rng: np.random.Generator, source: Image) -> Image:
    """One half of a digit, ``(8, 8)``; the rest is empty."""
    result = np.zeros_like(source)
    height, width = [(4, 8), (8, 4)][rng.integers(2)]
    top = int(rng.choice([0, SOURCE_SIDE - height]))
    left = int(rng.choice([0, SOURCE_SIDE - width]))
    region = np.s_[top : top + height, left : left + width]
    result[region] = source[region]
    return result


def letter_strokes(rng: np.random.Generator, size: float) -> Cover:
    """Four to six straight strokes that meet, like a letter of no alphabet; ``(h, w)``."""
    side = int(np.ceil(size)) + 4
    ends = rng.uniform(2, side - 3, (rng.integers(5, 8), 2))
    lines = [(a, (a + b) / 2, b) for a, b in pairwise(ends)]
    return _cropped(_curve(side, lines, max(1.5, size / rng.uniform(6, 10))))


def _curve(side: int, curves: list[tuple[Any, Any, Any]], thickness: float) -> Cover:
    """Quadratic curves through three points each, drawn into one ``(side, side)`` cover."""
    canvas = np.zeros((side, side), np.uint8)
    steps = np.linspace(0, 1, 12)[:, None]
    for start, middle, end in curves:
        control = 2 * middle - (start + end) / 2
        points = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * control + steps**2 * end
        # OpenCV takes fixed-point coordinates; 4 fractional bits keep the curve smooth.
        fixed = np.rint(points * 16).astype(np.int32)
        cv2.polylines(canvas, [fixed], False, 255, max(1, round(thickness)), cv2.LINE_AA, 4)
    return _opacity(canvas)


def _opacity(canvas: NDArray[np.uint8]) -> Cover:
    return canvas.astype(np.float32) / np.float32(255)


def _cropped(cover: Cover) -> Cover:
    rows, columns = np.flatnonzero(cover.any(axis=1)), np.flatnonzero(cover.any(axis=0))
    if not len(rows):
        return cover[:1, :1]
    return cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _resized(image: NDArray[Any], side: int) -> Image:
    resized = cv2.resize(image.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    return resized.reshape(side, side, -1).astype(np.float32, copy=False)


def _blend_in(image: Image, cover: Cover, colour: NDArray[np.float32], opacity: float) -> None:
    image += (cover * opacity)[..., None] * (colour - image)
