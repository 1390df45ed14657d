"""Draw one metric of all heads in milliseconds, since training waits for it."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

TEXT, PAPER = "#202020", "#ffffff"
UNSEEN = "#d0d0d0"
MARGIN, LINE, BAR = 8, 16, 14
BIGGEST, SMALLEST = 26, 3  # pixels of a head's square
AREA = 720  # most pixels of all squares, in width and in height


def draw_heatmap(array: np.ndarray, title: str) -> Image.Image:
    """Draw layers downwards and heads across, with a scale beside them.

    Args:
        array: [layers, heads]; values that are not finite (not observed) are grey.
    """
    array = np.where(np.isfinite(array), array, np.nan)
    layers, heads = array.shape
    side = max(SMALLEST, min(BIGGEST, AREA // max(layers, heads)))
    low, high = (np.nanmin(array), np.nanmax(array)) if not np.isnan(array).all() else (0.0, 1.0)
    font = ImageFont.load_default(12)
    numbers = [f"{value:.3g}" for value in (high, (low + high) / 2, low)]
    left = MARGIN + 2 * LINE + 8
    top = MARGIN + LINE + 8
    width, height = heads * side, max(layers * side, 3 * LINE)
    scale = left + width + 2 * MARGIN
    right = scale + BAR + 4 + max(math.ceil(font.getlength(number)) for number in numbers)
    right = max(right, left + math.ceil(font.getlength(title)))
    picture = Image.new("RGB", (right + MARGIN, top + height + 2 * LINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((left, MARGIN), title, TEXT, font)
    picture.paste(
        _draw_cells(array, low, high).resize((width, layers * side), Image.Resampling.NEAREST),
        (left, top),
    )
    ramp = np.linspace(1, 0, height)[:, None]
    picture.paste(_draw_cells(ramp, 0, 1).resize((BAR, height)), (scale, top))
    for number, place in zip(numbers, (0, height // 2 - 7, height - 14), strict=True):
        draw.text((scale + BAR + 4, top + place), number, TEXT, font)
    for index in _choose_ticks(heads):
        draw.text((left + index * side + side // 2, top + height + 2), str(index), TEXT, font, "ma")
    for index in _choose_ticks(layers):
        draw.text((left - 4, top + index * side + side // 2), str(index), TEXT, font, "rm")
    draw.text((left + width // 2, top + height + LINE), "head", TEXT, font, "ma")
    draw.text((MARGIN, top + height + LINE), "layer", TEXT, font)
    return picture


def _draw_cells(array: np.ndarray, low: float, high: float) -> Image.Image:
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=UNSEEN)
    shares = (array - low) / (high - low) if high > low else array * 0.0
    return Image.fromarray(colours(np.ma.masked_invalid(shares), bytes=True)[..., :3])


def _choose_ticks(count: int) -> range:
    return range(0, count, max(1, math.ceil(count / 16)))
