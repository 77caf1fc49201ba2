"""One picture of a map: its points from above, the way of the camera, the views found again.

Drawn with OpenCV alone, so that it needs no display and no extra package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from feedforward_recon.errors import InputError
from feedforward_recon.io.writers import not_writable
from feedforward_recon.types import FloatArray, PointCloud, Trajectory

Colour = tuple[int, int, int]

PAPER: Colour = (250, 250, 248)
INK: Colour = (52, 58, 70)
PATH: Colour = (24, 105, 255)
FOUND: Colour = (0, 168, 98)
REFUSED: Colour = (226, 48, 54)
# Everything is drawn larger and shrunk at the end: smooth points, lines and letters.
OVERSAMPLING = 2
FONT = cv2.FONT_HERSHEY_SIMPLEX
MAX_POINTS = 1_500_000


def save_overview(path_png: str | Path, cloud: PointCloud, trajectory: Trajectory,
                  localised: Sequence[FloatArray] = (), refused: Sequence[FloatArray] = (), *,
                  up: FloatArray | None = None, metres_per_unit: float | None = 1.0,
                  title: str = '', width_px: int = 1600) -> None:
    """Draw a map from above and save it as PNG.

    localised: poses T_map_cam [4, 4] of views found in the map, drawn as camera wedges.
    refused: true poses of views that were not found, where they are known.
    up: direction [3] that points up in the map frame; estimated from the cameras when None.
    metres_per_unit: scale of the map, None when unknown (the scale bar then says 'units').

    Raises InputError when there is nothing to draw or the file cannot be written.
    """
    path = Path(path_png)
    if len(trajectory) == 0 and len(cloud) == 0:
        raise InputError(f'{path}: expected a cloud or a trajectory to draw, found neither; '
                         'map some frames first')
    image = draw_overview(cloud, trajectory, localised, refused, up=up,
                          metres_per_unit=metres_per_unit, title=title, width_px=width_px)
    _, png = cv2.imencode('.png', image[..., ::-1])
    try:
        path.write_bytes(png.tobytes())
    except OSError as error:
        raise not_writable(path, error) from None


def draw_overview(cloud: PointCloud, trajectory: Trajectory,
                  localised: Sequence[FloatArray] = (), refused: Sequence[FloatArray] = (), *,
                  up: FloatArray | None = None, metres_per_unit: float | None = 1.0,
                  title: str = '', width_px: int = 1600) -> NDArray[np.uint8]:
    """The picture of ``save_overview`` as RGB uint8 [H, W, 3], W = width_px."""
    up = estimate_up(trajectory) if up is None else np.asarray(up, float)
    shown = without_ceiling(cloud, trajectory, up)
    view = _View.above(shown, trajectory, up, width_px * OVERSAMPLING)
    canvas = np.full((*view.size_wh[::-1], 3), PAPER, np.uint8)
    _draw_points(canvas, view, shown)
    wedge = 0.034 * view.extent
    _draw_path(canvas, view, trajectory)
    for poses, colour in ((localised, FOUND), (refused, REFUSED)):
        for T_map_cam in poses:
            _draw_wedge(canvas, view, np.asarray(T_map_cam, float), wedge, colour)
    canvas = np.concatenate([canvas, _footer(view, len(trajectory), len(localised), len(refused),
                                             metres_per_unit, title)])
    height_px = round(len(canvas) / OVERSAMPLING)
    return cv2.resize(canvas, (width_px, height_px), interpolation=cv2.INTER_AREA) \
        .astype(np.uint8)


def estimate_up(trajectory: Trajectory) -> NDArray[np.float64]:
    """Unit vector [3] that points up in the map frame, from how a camera is carried.

    Cameras are rarely rolled, so up is across their x axes; they mostly move on a floor, so it
    is the direction of least motion; and their y axes point down on average. The first two
    decide where they can, the last one decides between what is left, and the sign.
    """
    if len(trajectory) == 0:
        return np.array([0.0, 0.0, 1.0])
    across, down = trajectory.T_map_cam[:, :3, 0], trajectory.T_map_cam[:, :3, 1].mean(0)
    offsets = trajectory.positions - trajectory.positions.mean(0)
    motion = offsets.T @ offsets / max(float((offsets**2).sum()), 1e-12)
    cost = across.T @ across / len(across) + 0.3 * motion - 0.5 * np.outer(down, down)
    direction = np.linalg.eigh(cost)[1][:, 0]
    return direction if direction @ down < 0 else -direction


def without_ceiling(cloud: PointCloud, trajectory: Trajectory, up: FloatArray) -> PointCloud:
    """Points no higher than a little above the cameras, at most ``MAX_POINTS`` of them."""
    index = np.arange(len(cloud))
    if len(trajectory) and len(cloud):
        heights = cloud.xyz @ up
        span = float(np.subtract(*np.percentile(heights, (98, 2))))
        index = np.flatnonzero(heights < (trajectory.positions @ up).max() + 0.12 * span)
    index = index[::len(index) // MAX_POINTS + 1]
    return PointCloud(cloud.xyz[index], cloud.rgb[index])


@dataclass(frozen=True)
class _View:
    """A pinhole eye that looks straight down from high above, and its canvas.

    R_view_map [3, 3]: rows are the image's right, its down, and the way down; centre [3]: the
    map point below the eye at the height of the cameras; height: of the eye above it, map
    units; scale: pixels per map unit at that height.
    """

    R_view_map: NDArray[np.float64]
    centre: NDArray[np.float64]
    height: float
    scale: float
    extent: float
    size_wh: tuple[int, int]

    @staticmethod
    def above(cloud: PointCloud, trajectory: Trajectory, up: NDArray, width_px: int) -> _View:
        """The eye that sees the whole cloud (but for a few strays), walls along the picture."""
        up = up / np.linalg.norm(up)
        helper = np.eye(3)[np.argmin(np.abs(up))]
        right = np.cross(helper, up) / np.linalg.norm(np.cross(helper, up))
        level = np.stack([right, np.cross(right, up), -up])
        places = trajectory.positions if len(trajectory) else cloud.xyz.astype(float)
        corners = _core(cloud.xyz @ level.T, places @ level.T)
        (cx, cy), _, _ = box = cv2.minAreaRect(corners[:, :2].astype(np.float32))
        turn = np.deg2rad(_level_angle(box))
        c, s = np.cos(turn), np.sin(turn)
        R = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]]) @ level
        eye_level = float(np.median(places @ level[2]))
        centre = level.T @ (cx, cy, eye_level)
        seen = (corners @ level - centre) @ R.T
        extent = float(np.ptp(seen[:, :2], axis=0).max()) or 1.0
        height = 1.6 * extent
        flat = np.abs(seen[:, :2] * (height / (height + np.maximum(seen[:, 2:], -0.5 * height))))
        half = flat.max(0) + 0.04 * extent
        half = np.maximum(half, (half[1] / 0.7, 0.35 * half[0]))  # neither tower nor ribbon
        scale = width_px / (2 * half[0])
        return _View(R, centre, height, scale, extent, (width_px, round(2 * half[1] * scale)))

    def seen(self, points: NDArray) -> NDArray[np.float64]:
        """Points [N, 3] of the map relative to the centre: right, down in the picture, below."""
        return (np.asarray(points, float) - self.centre) @ self.R_view_map.T

    def project(self, points: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pixels [N, 2] and distances [N] below the eye of map points [N, 3]."""
        seen = self.seen(points)
        distance = seen[:, 2] + self.height
        pixels = seen[:, :2] * (self.scale * self.height / np.maximum(distance, 1e-9))[:, None]
        return pixels + np.array(self.size_wh) / 2, distance


def _core(points: NDArray, places: NDArray) -> NDArray[np.float64]:
    """The camera places and the points [M, 3] but for strays far from all others."""
    if len(points) == 0:
        return places
    points = points[::max(1, len(points) // 100_000)]
    distance = np.linalg.norm(points - np.median(points, 0), axis=1)
    return np.concatenate([points[distance <= 1.4 * np.percentile(distance, 95)], places])


def _level_angle(box: tuple) -> float:
    """Degrees that turn a cv2 rotated rectangle so that its longer side lies across."""
    corners = cv2.boxPoints(box)
    sides = corners[1] - corners[0], corners[2] - corners[1]
    x, y = max(sides, key=lambda side: float(np.hypot(*side)))
    angle = np.rad2deg(np.arctan2(y, x))
    return float((angle + 90) % 180 - 90)


def _draw_points(canvas: NDArray[np.uint8], view: _View, cloud: PointCloud) -> None:
    """Points as small squares, near ones over far ones, with edges shaded."""
    if len(cloud) == 0:
        return
    pixels, distance = view.project(cloud.xyz)
    order = np.argsort(-distance, kind='stable')
    size = int(np.clip(np.ceil(1.6 * _spacing(cloud.xyz) * view.scale), 2, 16))
    corner = np.floor(pixels[order] - size / 2).astype(int)
    h, w = canvas.shape[:2]
    buffer = np.full((h, w), np.inf, np.float32)
    # Of the points that fall on one pixel the nearest is assigned last, and stays.
    for chunk in np.array_split(np.arange(len(order)), max(1, len(order) // 100_000)):
        rows = (corner[chunk, 1, None, None] + np.arange(size)[:, None]).repeat(size, 2)
        cols = (corner[chunk, 0, None, None] + np.arange(size)).repeat(size, 1)
        inside = (rows >= 0) & (rows < h) & (cols >= 0) & (cols < w)
        which = np.broadcast_to(order[chunk, None, None], rows.shape)[inside]
        canvas[rows[inside], cols[inside]] = cloud.rgb[which]
        buffer[rows[inside], cols[inside]] = distance[which]
    _close_pinholes(canvas, buffer, size)
    _shade_edges(canvas, buffer, view.extent)


def _close_pinholes(canvas: NDArray[np.uint8], buffer: NDArray[np.float32], size: int) -> None:
    """Give pixels between points, where the paper shines through, the mean colour around."""
    known = np.isfinite(buffer).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size + 1, size + 1))
    gap = cv2.morphologyEx(known, cv2.MORPH_CLOSE, disc) > known
    window = (2 * size + 1, 2 * size + 1)
    share = np.maximum(cv2.boxFilter(known.astype(np.float32), -1, window), 1e-6)
    colour = cv2.boxFilter(canvas * known[..., None].astype(np.float32), -1, window)
    depth = cv2.boxFilter(np.where(known, buffer, 0).astype(np.float32), -1, window)
    canvas[gap] = (colour[gap] / share[gap, None]).astype(np.uint8)
    buffer[gap] = depth[gap] / share[gap]


def _spacing(points: NDArray) -> float:
    """Median distance between neighbouring points, from at most 2000 of them."""
    if len(points) < 2:
        return 0.0
    some = points[::max(1, len(points) // 2000)]
    return float(np.median(cKDTree(points).query(some, k=2)[0][:, 1]))


def _shade_edges(canvas: NDArray[np.uint8], buffer: NDArray[np.float32], extent: float) -> None:
    """Darken pixels that lie deeper than their surroundings.

    Boucheny, "Visualisation scientifique de grands volumes de donnees" (2009): eye-dome lighting.
    """
    known = np.isfinite(buffer)
    depth = np.where(known, buffer, buffer[known].max())
    deeper = np.zeros_like(depth)
    for radius in (3, 8):
        kernel = np.ones((2 * radius + 1, 2 * radius + 1), np.float32) / (2 * radius + 1)**2
        step = depth - cv2.filter2D(depth, -1, kernel)
        deeper += np.clip(step / (0.02 * extent), 0, 1)
    shade = np.where(known, 1 - 0.25 * deeper, 1.0)
    canvas[:] = np.clip(canvas * shade[..., None], 0, 255)


def _to_int(pixels: NDArray) -> NDArray[np.int32]:
    """Pixels in OpenCV's fixed point with 4 binary places."""
    return np.round(np.clip(pixels, -1e6, 1e6) * 16).astype(np.int32)


def _draw_path(canvas: NDArray[np.uint8], view: _View, trajectory: Trajectory) -> None:
    """The camera's way as a line with a white rim, a ring where it starts, a dot at its end."""
    if len(trajectory) == 0:
        return
    pixels, _ = view.project(trajectory.positions)
    points, unit = _to_int(pixels), max(2, canvas.shape[1] // 640)
    for colour, thickness in (((255, 255, 255), 3 * unit), (PATH, round(1.4 * unit))):
        cv2.polylines(canvas, [points[:, None]], False, colour, thickness, cv2.LINE_AA, 4)
    for centre, inner in ((points[0], (255, 255, 255)), (points[-1], PATH)):
        x, y = map(int, centre)
        cv2.circle(canvas, (x, y), 16 * 3 * unit, PATH, -1, cv2.LINE_AA, 4)
        cv2.circle(canvas, (x, y), 16 * 2 * unit, inner, -1, cv2.LINE_AA, 4)


def _draw_wedge(canvas: NDArray[np.uint8], view: _View, T_map_cam: NDArray, length: float,
                colour: Colour) -> None:
    """A camera as a translucent triangle that opens the way it looks."""
    rays = np.array([[0, 0, 0], [-0.5, 0, 1], [0.5, 0, 1.0]]) * length
    pixels, distance = view.project(rays @ T_map_cam[:3, :3].T + T_map_cam[:3, 3])
    if not (np.isfinite(pixels).all() and (distance > 0).all()):
        return
    points = _to_int(pixels)
    x, y = np.floor(pixels.min(0)).astype(int) - 8
    right, bottom = np.ceil(pixels.max(0)).astype(int) + 8
    window = canvas[max(y, 0):max(bottom, 0), max(x, 0):max(right, 0)]
    if window.size == 0:
        return
    filled, shift = window.copy(), _to_int(np.maximum((x, y), 0))
    cv2.fillPoly(filled, [points - shift], colour, cv2.LINE_AA, 4)
    window[:] = cv2.addWeighted(window, 0.45, filled, 0.55, 0)
    unit = max(2, canvas.shape[1] // 1000)
    for line, thickness in (((255, 255, 255), 2 * unit), (colour, unit)):
        cv2.polylines(canvas, [points[:, None]], True, line, thickness, cv2.LINE_AA, 4)


def _footer(view: _View, frames: int, found: int, refused: int, metres_per_unit: float | None,
            title: str) -> NDArray[np.uint8]:
    """The strip below the picture: title, legend and scale bar."""
    width = view.size_wh[0]
    u = width / 1600
    strip = np.full((round(92 * u), width, 3), PAPER, np.uint8)
    cv2.line(strip, (0, 0), (width, 0), (222, 224, 228), max(1, round(2 * u)))
    middle, x = 50 * u, 36 * u
    if title:
        x = _text(strip, title, x, middle, 0.92 * u, True) + 44 * u
    entries = [(PATH, f'trajectory, {frames} frames')] if frames else []
    entries += [(FOUND, f'{found} views localised')] if found else []
    entries += [(REFUSED, f'{refused} views refused')] if refused else []
    for colour, words in entries:
        _symbol(strip, x, middle, u, colour)
        x = _text(strip, words, x + 48 * u, middle, 0.72 * u, False) + 40 * u
    _scale_bar(strip, view, middle, u, metres_per_unit)
    return strip


def _symbol(strip: NDArray[np.uint8], x: float, y: float, u: float, colour: Colour) -> None:
    if colour == PATH:
        points = np.array([[x, y + 5 * u], [x + 13 * u, y - 5 * u], [x + 24 * u, y + 4 * u],
                           [x + 36 * u, y - 6 * u]])
        cv2.polylines(strip, [_to_int(points)[:, None]], False, colour, round(5 * u),
                      cv2.LINE_AA, 4)
        return
    points = np.array([[x, y], [x + 32 * u, y - 15 * u], [x + 32 * u, y + 15 * u]])
    light = tuple(int(0.45 * p + 0.55 * c) for p, c in zip(PAPER, colour, strict=True))
    cv2.fillPoly(strip, [_to_int(points)], light, cv2.LINE_AA, 4)
    cv2.polylines(strip, [_to_int(points)[:, None]], True, colour, round(2.5 * u), cv2.LINE_AA, 4)


def _text(strip: NDArray[np.uint8], words: str, x: float, y: float, scale: float,
          bold: bool) -> float:
    """Write ``words`` with their middle at height y; returns where they end."""
    thickness = max(1, round(scale * (3 if bold else 2)))
    (width, height), _ = cv2.getTextSize(words, FONT, scale, thickness)
    place = (round(x), round(y + height / 2))
    cv2.putText(strip, words, place, FONT, scale, INK, thickness, cv2.LINE_AA)
    return x + width


def _scale_bar(strip: NDArray[np.uint8], view: _View, y: float, u: float,
               metres_per_unit: float | None) -> None:
    """A bar of a round length, true at the height of the cameras."""
    width = view.size_wh[0]
    per_pixel = (metres_per_unit or 1.0) / view.scale
    target = 0.2 * width * per_pixel
    power = 10.0**np.floor(np.log10(target))
    length = power * max(step for step in (1, 2, 5) if step * power <= target)
    pixels = length / per_pixel
    right = width - 40 * u
    line, left = max(1, round(4 * u)), right - pixels
    for a, b in (((left, y + 14 * u), (right, y + 14 * u)),
                 ((left, y + 6 * u), (left, y + 22 * u)),
                 ((right, y + 6 * u), (right, y + 22 * u))):
        cv2.line(strip, (round(a[0]), round(a[1])), (round(b[0]), round(b[1])), INK, line)
    words = f'{length:g} {"units" if metres_per_unit is None else "m"}'
    scale = 0.72 * u
    (text_width, _), _ = cv2.getTextSize(words, FONT, scale, max(1, round(2 * scale)))
    _text(strip, words, (left + right - text_width) / 2, y - 14 * u, scale, False)
