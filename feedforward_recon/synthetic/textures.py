"""Procedural textures: each is a function of (rng, height, width, pixels per metre).

They return float32 [height, width, 3] RGB in 0..1 and draw features at physical sizes, so a
brick is a brick on every wall. Variety matters more than beauty: encoders learn from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Texture = Callable[[np.random.Generator, int, int, float], Image]

LETTERS = np.array(list('abcdefghijklmnoprstuvwyzABCDEFGHKLMNPRSTUVZ0123456789&%+?!'))
FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX,
         cv2.FONT_HERSHEY_TRIPLEX)


def noise(rng: np.random.Generator, h: int, w: int, coarsest: float, finest: float = 2.0,
          decay: float = 0.6, stretch: tuple[float, float] = (1, 1)) -> Image:
    """Fractal noise [h, w] of about zero mean and unit deviation.

    coarsest, finest: largest and smallest feature size in pixels; decay: amplitude ratio of
    successive octaves; stretch: (vertical, horizontal) elongation of the features.
    """
    out = np.zeros((h, w), np.float32)
    amplitude, power, cell = 1.0, 0.0, max(coarsest, 2.0)
    while cell >= finest:
        grid = (int(h / (cell * stretch[0])) + 3, int(w / (cell * stretch[1])) + 3)
        values = rng.standard_normal(grid, np.float32)
        out += amplitude * cv2.resize(values, (w, h), interpolation=cv2.INTER_CUBIC)
        power += amplitude**2
        amplitude, cell = amplitude * decay, cell / 2
    return out / np.float32(np.sqrt(max(power, 1e-6)) * 0.75)


def _hues(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Hues [count] in degrees: wood, cloth and paint are mostly warm, the rest is anything."""
    warm, cool, other = rng.normal(32, 14, count), rng.normal(212, 12, count), \
        rng.uniform(0, 360, count)
    return np.choose(rng.choice(3, count, p=(0.4, 0.15, 0.45)), (warm, cool, other)) % 360


def colour(rng: np.random.Generator, saturation: float = 0.6,
           value: tuple[float, float] = (0.2, 0.95)) -> Image:
    """A random RGB colour [3] in 0..1 of at most the given saturation."""
    hsv = np.stack([_hues(rng, 1), rng.uniform(0, saturation, 1), rng.uniform(*value, 1)], -1)
    return cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0, 0]


def palette(rng: np.random.Generator, count: int, saturation: float = 0.7) -> Image:
    """Colours [count, 3] that go together: hues near one or two others, any brightness."""
    hues = (rng.choice(_hues(rng, 2), count) + rng.normal(0, 12, count)) % 360
    hsv = np.stack([hues, rng.uniform(0, saturation, count), rng.uniform(0.1, 1.0, count)], -1)
    return cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0]


def _flat(shade: Sequence[float] | NDArray, h: int, w: int) -> Image:
    return np.broadcast_to(np.asarray(shade, np.float32), (h, w, 3)).copy()


def _blend(a: NDArray, b: NDArray, weight: Image) -> Image:
    """Two colours or images: the first where weight is 0, the second where it is 1."""
    weight = weight[..., None]
    return (a * (1 - weight) + b * weight).astype(np.float32)


def _grain(rng: np.random.Generator, image: NDArray[np.floating], ppm: float,
           strength: float) -> Image:
    """Multiply by stains and fine grain so that no two spots of a face are the same."""
    h, w = image.shape[:2]
    stains = 1 + strength * noise(rng, h, w, 0.3 * ppm, 2.0, 0.75)
    return (image * stains[..., None]).astype(np.float32)


def paint(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Almost uniform wall paint: the hard case for every matcher."""
    return _grain(rng, _flat(colour(rng, 0.3, (0.55, 0.95)), h, w), ppm, 0.02)


def plaster(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Rough plaster, concrete or stone of two mixed colours."""
    a = colour(rng, 0.35, (0.5, 0.98))
    b = np.clip(a * rng.uniform(0.6, 0.92) + rng.normal(0, 0.04, 3), 0, 1)
    field = noise(rng, h, w, rng.uniform(0.05, 0.8) * ppm, 2.0, rng.uniform(0.6, 1.0))
    return _grain(rng, _blend(a, b, np.clip(0.5 + 0.35 * field, 0, 1)), ppm, 0.06)


def marble(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Veins: ridges of fractal noise."""
    field = noise(rng, h, w, rng.uniform(0.2, 0.6) * ppm, 2.0, 0.55)
    veins = np.exp(-np.abs(field) * rng.uniform(4, 10))
    return _grain(rng, _blend(colour(rng, 0.3, (0.5, 1)), colour(rng, 0.6, (0.1, 0.5)), veins),
                  ppm, 0.05)


def tiles(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Tiles, bricks or parquet: cells of individual shade between joints."""
    ch, cw = rng.uniform(0.06, 0.4, 2) * ppm
    y, x = np.mgrid[:h, :w].astype(np.float32)
    row = np.floor(y / ch)
    x = x + (row % 2) * (cw * rng.choice([0.0, 0.5]))
    col = np.floor(x / cw)
    joint = max(0.004 * ppm, 1.0)
    edge = np.minimum.reduce([y - row * ch, x - col * cw, (row + 1) * ch - y,
                              (col + 1) * cw - x])
    shades = palette(rng, int(rng.integers(1, 4)), 0.5) * 0.7 + 0.2
    shape = (int(row.max()) + 1, int(col.max()) + 1)
    cells = shades[rng.integers(0, len(shades), shape)]
    cells = cells * rng.uniform(0.8, 1.15, (*shape, 1)).astype(np.float32)
    image = cells[row.astype(int), col.astype(int)]
    image = _blend(image, colour(rng, 0.1), np.clip(1.5 - edge / joint, 0, 1))
    return _grain(rng, image, ppm, rng.uniform(0.04, 0.12))


def wood(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Planks with long grain and growth rings, in either direction."""
    if rng.random() < 0.4:
        return np.ascontiguousarray(_planks(rng, w, h, ppm).transpose(1, 0, 2))
    return _planks(rng, h, w, ppm)


def _planks(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    plank = rng.uniform(0.07, 0.3) * ppm
    row = (np.arange(h) / plank).astype(int)
    count = row[-1] + 1
    rings = noise(rng, h, w, 0.12 * ppm, 3.0, 0.5, (0.35, 5.0))
    rings = rings + rng.uniform(-3, 3, count).astype(np.float32)[row][:, None]
    grain = np.sin(rings * rng.uniform(3, 7)) * 0.5 + noise(rng, h, w, 8, 2, 0.7, (0.5, 9.0)) * 0.5
    base = np.array([rng.uniform(0.35, 0.8), 0, 0], np.float32)
    base[1:] = base[0] * np.array([rng.uniform(0.6, 0.85), rng.uniform(0.3, 0.65)])
    shade = rng.uniform(0.75, 1.1, count).astype(np.float32)[row][:, None]
    seam = np.ones((h, w), np.float32)
    seam[np.abs(np.arange(h) - (row + 0.5) * plank) > plank / 2 - max(0.003 * ppm, 1)] = 0.45
    for index in range(count):
        for x in np.arange(rng.uniform(0, 1.2) * ppm, w, rng.uniform(0.8, 1.6) * ppm).astype(int):
            seam[row == index, x:x + 2] = 0.45
    return base * (shade * seam * (1 + 0.14 * grain))[..., None]


def dead_leaves(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Occluding shapes of power-law size: the statistics of photographs.

    Lee, Mumford, Huang, "Occlusion models for natural images" (2001): radii ~ r^-3.
    """
    shades = palette(rng, 24, rng.uniform(0.2, 0.9)) * 255
    image, smallest = np.full((h, w, 3), shades[0], np.uint8), max(0.006 * ppm, 2.5)
    count = int(np.clip(h * w / (smallest**2 * 12), 50, 2500))
    radii = smallest / np.sqrt(rng.uniform((smallest / (0.4 * min(h, w) + smallest))**2, 1, count))
    for radius in np.sort(radii)[::-1] if rng.random() < 0.5 else radii:
        _leaf(rng, image, float(radius), tuple(map(float, rng.choice(shades))))
    texture = noise(rng, h, w, 0.2 * ppm, 2.0, 0.8)
    return image.astype(np.float32) / 255 * (1 + 0.1 * texture)[..., None]


def _leaf(rng: np.random.Generator, image: NDArray[np.uint8], radius: float,
          shade: tuple[float, ...]) -> None:
    """Draw one ellipse, rectangle or polygon at a random place of ``image``."""
    h, w = image.shape[:2]
    centre = rng.uniform((0, 0), (w, h))
    kind, turn = rng.integers(3), rng.uniform(0, 360)
    if kind == 0:
        axes = (radius, radius * rng.uniform(0.3, 1))
        cv2.ellipse(image, (tuple(map(float, centre)), (2 * axes[0], 2 * axes[1]), turn), shade,
                    -1, cv2.LINE_AA)
        return
    corners = 4 if kind == 1 else int(rng.integers(3, 8))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) if kind == 2 else \
        np.deg2rad(turn) + np.array([0.6, np.pi - 0.6, np.pi + 0.6, -0.6]) * rng.uniform(0.7, 1.3)
    points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    cv2.fillPoly(image, [np.round(points * 16).astype(np.int32)], shade, cv2.LINE_AA, 4)


def blobs(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Smooth random regions in a few colours, as on curtains and camouflage."""
    field = noise(rng, h, w, rng.uniform(0.06, 0.35) * ppm, 4.0, 0.5)
    levels = np.sort(rng.normal(0, 0.9, rng.integers(1, 5)))
    shades = palette(rng, len(levels) + 1)
    return _grain(rng, shades[np.searchsorted(levels, field)], ppm, 0.06)


def stripes(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Bands of random width and a few colours: curtains, blinds, cloth."""
    length = w if rng.random() < 0.7 else h
    edges = np.cumsum(rng.uniform(0.012, 0.06, length) * ppm)
    index = np.searchsorted(edges, np.arange(length))
    shades = palette(rng, int(rng.integers(2, 7)))
    bands = shades[rng.integers(0, len(shades), index[-1] + 1)][index]
    image = np.broadcast_to(bands if length == w else bands[:, None], (h, w, 3))
    return _grain(rng, image, ppm, 0.07)


def plaid(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Woven cloth: bands in both directions that shine through each other, and threads."""
    image, ppm_bands = np.zeros((h, w, 3), np.float32), ppm * rng.uniform(0.7, 3)
    shades = palette(rng, 5, 0.6) * 0.8 + 0.1
    for axis, length in ((0, h), (1, w)):
        edges = np.cumsum(rng.uniform(0.01, 0.06, length) * ppm_bands)
        index = np.searchsorted(edges, np.arange(length))
        bands = shades[rng.integers(0, 5, index[-1] + 1)][index]
        image += 0.5 * np.expand_dims(bands, 1 - axis)
    threads = noise(rng, h, w, 3, 2, 0.7, (1, 4)) + noise(rng, h, w, 3, 2, 0.7, (4, 1))
    return _grain(rng, image * (1 + 0.06 * threads[..., None]), ppm, 0.08)


def landscape(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """A view as on photographs and through windows: sky, clouds, ridges, foliage in front."""
    sky = np.linspace(0, 1, h, dtype=np.float32)[:, None]
    image = _blend(colour(rng, 0.6, (0.5, 0.95)), colour(rng, 0.3, (0.8, 1.0)),
                   np.broadcast_to(sky, (h, w)))
    clouds = np.clip(noise(rng, h, w, 0.5 * h, 2, 0.6, (0.5, 1.5)) * 0.5, 0, 0.9)
    image = _blend(image, np.array([0.97, 0.96, 0.95]), clouds)
    rows, far = np.arange(h)[:, None], colour(rng, 0.35, (0.45, 0.8))
    near, count = colour(rng, 0.8, (0.1, 0.45)), int(rng.integers(2, 6))
    for layer in range(count):
        depth = (layer + 1) / count
        ridge = h * (0.25 + 0.6 * depth) - h * 0.09 * noise(rng, 1, w, 0.6 * w, 2, 0.5)[0]
        ground = far * (1 - depth) + near * depth
        rough = 1 + (0.1 + 0.3 * depth) * noise(rng, h, w, 0.2 * h, 2, 0.85)
        image = np.where((rows > ridge)[..., None], ground * rough[..., None], image)
    if rng.random() < 0.6:
        # Houses or trunks stand before the ridges.
        for _ in range(rng.integers(2, 9)):
            x, top = int(rng.uniform(0, w)), int(h * rng.uniform(0.2, 0.8))
            wide = int(rng.uniform(0.02, 0.2) * w) + 1
            wall = image[top:, x:x + wide]
            wall[:] = 0.2 * wall + 0.8 * colour(rng, 0.5, (0.1, 0.9))
            step = max(int(0.05 * h), 3)
            wall[step // 2::step, ::step] *= 0.3
            wall[step // 2 + 1::step, ::step] *= 0.3
    return _grain(rng, np.clip(image, 0, 1), ppm, 0.03)


def window(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """A bright view behind a frame with bars."""
    image = np.clip(landscape(rng, h, w, ppm) * 1.3, 0, 1.4).astype(np.float32)
    frame, shade = max(int(0.05 * ppm), 2), colour(rng, 0.2, (0.2, 1.0))
    for start in np.linspace(0, w - frame, int(rng.integers(2, 4))).astype(int):
        image[:, start:start + frame] = shade
    for start in np.linspace(0, h - frame, int(rng.integers(2, 4))).astype(int):
        image[start:start + frame] = shade
    return _grain(rng, image, ppm, 0.02)


def books(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """A row of book backs with titles and uneven tops."""
    image, x = np.full((h, w, 3), 25, np.uint8), 0
    shelf = max(int(rng.uniform(0.24, 0.36) * ppm), 16)
    if h > 1.5 * shelf:
        # Several boards: each is a row of its own.
        boards = [books(rng, min(shelf, h - top), w, ppm) for top in range(0, h - 8, shelf)]
        rows = np.concatenate(boards)
        rows[::shelf][:, :] = rows[1::shelf][:len(rows[::shelf])] = colour(rng, 0.5)
        return np.pad(rows, ((0, h - len(rows)), (0, 0), (0, 0)))
    while x < w:
        width = int(max(rng.uniform(0.015, 0.05) * ppm, 4))
        top = int(h * rng.uniform(0, 0.25))
        cv2.rectangle(image, (x, top), (x + width - 2, h), _shade(rng, 0.8), -1)
        for _ in range(rng.integers(1, 4)):
            y = int(rng.uniform(top, h))
            cv2.rectangle(image, (x, y), (x + width - 2, y + int(rng.uniform(2, 0.05 * h + 3))),
                          _shade(rng, 0.8), -1)
        strip = np.full((max(width - 4, 2), max(h - top, 8), 3), image[h - 1, x], np.uint8)
        scale = max(width / 40, 0.2)
        cv2.putText(strip, words(rng, 3), (4, int(width * 0.6)), FONTS[rng.integers(4)], scale,
                    _shade(rng, 0.5), max(1, int(scale * 2)), cv2.LINE_AA)
        patch = cv2.rotate(strip, cv2.ROTATE_90_CLOCKWISE)[:h - top, :max(w - x - 1, 0)]
        shown = (patch != patch[-1, -1]).any(-1) if patch.size else np.zeros((0, 0), bool)
        image[top:top + len(patch), x + 1:x + 1 + patch.shape[1]][shown] = patch[shown]
        x += width
    return _grain(rng, image.astype(np.float32) / 255, ppm, 0.06)


def _shade(rng: np.random.Generator, saturation: float) -> tuple[float, ...]:
    return tuple(map(float, colour(rng, saturation, (0.05, 1.0)) * 255))


def words(rng: np.random.Generator, count: int) -> str:
    """Random pronounceable-looking letters, ``count`` words."""
    return ' '.join(''.join(rng.choice(LETTERS, rng.integers(2, 9))) for _ in range(count))


def poster(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """A printed page: picture, headline and paragraphs."""
    paper = colour(rng, 0.35, (0.75, 1.0)) if rng.random() < 0.7 else colour(rng, 0.8, (0.1, 0.5))
    image = np.full((h, w, 3), paper * 255, np.uint8)
    ink = tuple(map(float, (np.array([15, 15, 20]) if paper.mean() > 0.5 else [235, 230, 220])))
    margin = max(int(0.06 * min(h, w)), 1)
    y = margin
    if rng.random() < 0.8:
        height = int(h * rng.uniform(0.25, 0.55))
        picture = dead_leaves(rng, max(height, 4), max(w - 2 * margin, 4), ppm * 1.5)
        image[y:y + len(picture), margin:margin + picture.shape[1]] = \
            np.clip(picture * 255, 0, 255)[:h - y, :w - margin]
        y += height
    while y < h - margin:
        size = float(rng.choice([0.012, 0.018, 0.03, 0.06], p=[0.4, 0.3, 0.2, 0.1]) * ppm)
        scale = max(size / 22, 0.3)
        y += int(22 * scale * 1.6)
        shade = ink if rng.random() < 0.75 else _shade(rng, 1.0)
        cv2.putText(image, words(rng, 12), (margin, min(y, h - 2)), FONTS[rng.integers(4)], scale,
                    shade, max(1, round(scale * rng.uniform(1, 2.5))), cv2.LINE_AA)
        y += int(rng.uniform(0, 0.03) * h)
    image[:, w - margin:] = paper * 255
    return _grain(rng, image.astype(np.float32) / 255, ppm, 0.03)


def panels(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """Doors and drawers with gaps and handles, on wood or lacquer."""
    image = wood(rng, h, w, ppm) if rng.random() < 0.5 else \
        _grain(rng, _flat(colour(rng, 0.5), h, w), ppm, 0.04)
    rows, cols = rng.integers(1, 5), max(1, round(w / ppm / rng.uniform(0.35, 0.7)))
    ys, xs = np.linspace(0, h, rows + 1).astype(int), np.linspace(0, w, cols + 1).astype(int)
    gap = max(1, int(0.005 * ppm))
    metal = tuple(map(float, colour(rng, 0.2, (0.2, 0.9))))
    for y0, y1 in zip(ys[:-1], ys[1:], strict=True):
        for x0, x1 in zip(xs[:-1], xs[1:], strict=True):
            image[y0:y1, x0:x1] *= rng.uniform(0.9, 1.08)
            cv2.rectangle(image, (int(x0), int(y0)), (int(x1), int(y1)), (0.08, 0.07, 0.06), gap)
            centre = (int(x0 + (x1 - x0) * rng.choice([0.12, 0.5, 0.88])), int((y0 + y1) / 2))
            cv2.circle(image, centre, max(2, int(0.016 * ppm)), metal, -1, cv2.LINE_AA)
            cv2.circle(image, centre, max(2, int(0.016 * ppm)), (0.05, 0.05, 0.05), 1, cv2.LINE_AA)
    return image


def rug(rng: np.random.Generator, h: int, w: int, ppm: float) -> Image:
    """A woven pattern that repeats, with borders and wear."""
    cell = max(int(rng.uniform(0.12, 0.45) * ppm), 8)
    motif = dead_leaves(rng, cell, cell, ppm * 2)
    if rng.random() < 0.7:
        motif = np.concatenate([motif, motif[:, ::-1]], 1)
        motif = np.concatenate([motif, motif[::-1]], 0)
    repeat = (h // motif.shape[0] + 1, w // motif.shape[1] + 1, 1)
    image = np.tile(motif, repeat)[:h, :w]
    wear = np.clip(0.25 + 0.2 * noise(rng, h, w, 0.6 * ppm), 0, 0.8)
    image = _blend(image, colour(rng, 0.4), wear)
    return _grain(rng, image, ppm, 0.12)


def with_details(rng: np.random.Generator, image: Image, ppm: float) -> Image:
    """Scatter marks of use over a large face: stickers, sockets, scratches and labels."""
    h, w = image.shape[:2]
    canvas = np.ascontiguousarray(np.clip(image * 255, 0, 255), np.uint8)
    for _ in range(int(rng.uniform(0.5, 4) * h * w / ppm**2)):
        size = rng.uniform(0.02, 0.12, 2) * ppm
        x, y = int(rng.uniform(0, w)), int(rng.uniform(0, h))
        shade, kind = _shade(rng, 0.7), rng.integers(4)
        if kind == 0:
            canvas[y:y + int(size[0]), x:x + int(size[1])] = shade
        elif kind == 1:
            cv2.circle(canvas, (x, y), max(2, int(size[0] / 3)), shade, -1, cv2.LINE_AA)
        elif kind == 2:
            cv2.putText(canvas, words(rng, 1), (x, y), FONTS[rng.integers(4)],
                        max(size[0] / 60, 0.3), shade, max(1, int(size[0] / 25)), cv2.LINE_AA)
        else:
            end = (x + int(rng.normal(0, 0.2) * ppm), y + int(rng.normal(0, 0.2) * ppm))
            cv2.line(canvas, (x, y), end, shade, max(1, int(0.003 * ppm)), cv2.LINE_AA)
    return canvas.astype(np.float32) / np.float32(255)


TEXTURES: dict[str, Texture] = {f.__name__: f for f in (
    paint, plaster, marble, tiles, wood, dead_leaves, blobs, stripes, plaid, landscape, window,
    books, poster, panels, rug)}
