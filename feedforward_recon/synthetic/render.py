"""Rendering of textured rectangles with NumPy and OpenCV: image and z-depth of any camera.

On a plane, 1/z is linear in the ray (x/z, y/z); so are u/z and v/z of the texture
coordinates. A z-buffer of 1/z over each rectangle's bounding window therefore needs a few
multiplications per pixel and no division, and works for distorted cameras as well, whose
rays are looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse

NEAR_M = 0.02
# Isotropic mip levels follow the longer axis of the footprint; the bias trades blur along the
# shorter axis for a little aliasing along the longer one.
LEVEL_BIAS = -0.7
# Faces overlap by this much (in metres) so that rounding leaves no gaps at shared edges.
SEAM_M = 2e-4


@dataclass(frozen=True)
class Rays:
    """Rays of all pixels of a camera: x, y float32 [H, W] (the ray is (x, y, 1)).

    columns [2, W], rows [2, H]: smallest and largest x of each column and y of each row.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    columns: NDArray[np.float32]
    rows: NDArray[np.float32]

    def window(self, low: NDArray, high: NDArray) -> tuple[slice, slice] | None:
        """Rows and columns that may see rays within low..high [2], or None."""
        cols = np.flatnonzero((self.columns[1] >= low[0]) & (self.columns[0] <= high[0]))
        rows = np.flatnonzero((self.rows[1] >= low[1]) & (self.rows[0] <= high[1]))
        if len(cols) == 0 or len(rows) == 0:
            return None
        return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)


@lru_cache(maxsize=8)
def rays_of(camera: Camera) -> Rays:
    """Rays through the pixel centres, computed once per camera."""
    u, v = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    xy = camera.normalise(np.stack([u, v], -1).reshape(-1, 2)).astype(np.float32)
    x, y = xy.T.reshape(2, camera.height, camera.width)
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    return Rays(x, y, np.stack([x.min(0), x.max(0)]), np.stack([y.min(1), y.max(1)]))


@dataclass(frozen=True)
class Surface:
    """A textured rectangle, seen from the side from which u runs right and v runs down.

    corner [3]: its upper left corner; side_u, side_v [3]: its sides, in metres, world frame.
    """

    corner: NDArray[np.float64]
    side_u: NDArray[np.float64]
    side_v: NDArray[np.float64]

    @cached_property
    def size_m(self) -> tuple[float, float]:
        """Lengths of side_u and side_v."""
        return float(np.linalg.norm(self.side_u)), float(np.linalg.norm(self.side_v))

    @cached_property
    def corners(self) -> NDArray[np.float64]:
        """The four corners [4, 3] in order around the rectangle."""
        o, u, v = self.corner, self.side_u, self.side_v
        return np.stack([o, o + u, o + u + v, o + v])


def pyramid(texture: NDArray[np.uint8]) -> list[NDArray]:
    """The texture uint8 [h, w, 3] and its halvings, down to a few pixels."""
    levels: list[NDArray] = [texture]
    while min(levels[-1].shape[:2]) > 3:
        h, w = levels[-1].shape[:2]
        size = ((w + 1) // 2, (h + 1) // 2)
        levels.append(cv2.resize(levels[-1], size, interpolation=cv2.INTER_AREA))
    return levels


@dataclass(frozen=True)
class _Plane:
    """A surface in a camera's frame as three linear functions of the ray (x, y, 1).

    inverse_depth, u, v float32 [3]: 1/z, and u/z and v/z in metres along the sides.
    distance: of the camera to the plane, metres.
    """

    inverse_depth: NDArray[np.float32]
    u: NDArray[np.float32]
    v: NDArray[np.float32]
    distance: float

    @staticmethod
    def of(surface: Surface, T_cam_world: NDArray) -> _Plane | None:
        """The plane of a surface, or None when the camera is behind it."""
        R = T_cam_world[:3, :3]
        corner = R @ surface.corner + T_cam_world[:3, 3]
        u = R @ surface.side_u / surface.size_m[0]
        v = R @ surface.side_v / surface.size_m[1]
        normal = np.cross(u, v)
        distance = float(normal @ corner)
        if distance < 1e-4:
            return None
        inverse_depth = normal / distance
        return _Plane(inverse_depth.astype(np.float32),
                      (u - (u @ corner) * inverse_depth).astype(np.float32),
                      (v - (v @ corner) * inverse_depth).astype(np.float32), distance)


def _linear(coefficients: NDArray, rays: Rays, window: tuple[slice, slice]) -> NDArray:
    a, b, c = coefficients
    return a * rays.x[window] + (b * rays.y[window] + c)


def _bounds(corners_cam: NDArray) -> tuple[NDArray, NDArray] | None:
    """Smallest and largest (x/z, y/z) of a polygon [N, 3], cut at the near plane."""
    following = np.roll(corners_cam, -1, 0)
    z, z_next = corners_cam[:, 2], following[:, 2]
    cut = (z > NEAR_M) != (z_next > NEAR_M)
    t = ((NEAR_M - z[cut]) / (z_next[cut] - z[cut]))[:, None]
    points = np.concatenate([corners_cam[z > NEAR_M],
                             corners_cam[cut] + t * (following[cut] - corners_cam[cut])])
    if len(points) == 0:
        return None
    xy = points[:, :2] / points[:, 2:]
    return xy.min(0), xy.max(0)


def _visible(surfaces: list[Surface], T_cam_world: NDArray, rays: Rays
             ) -> Iterator[tuple[int, _Plane, tuple[slice, slice]]]:
    """Surfaces that face the camera, with the window of pixels that may see them."""
    for index, surface in enumerate(surfaces):
        plane = _Plane.of(surface, T_cam_world)
        if plane is None:
            continue
        corners = surface.corners @ T_cam_world[:3, :3].T + T_cam_world[:3, 3]
        bounds = _bounds(corners)
        window = bounds and rays.window(*bounds)
        if window:
            yield index, plane, window


def rasterise(surfaces: list[Surface], camera: Camera, T_world_cam: NDArray
              ) -> tuple[NDArray[np.int32], NDArray[np.float32], dict[int, _Plane]]:
    """Nearest surface and 1/z of every pixel.

    Returns the index of the surface [H, W] (-1 where there is none), 1/z [H, W], and the
    planes of the surfaces that face the camera.
    """
    rays, T_cam_world = rays_of(camera), inverse(np.asarray(T_world_cam, float))
    nearest = np.full((camera.height, camera.width), -1, np.int32)
    buffer = np.zeros((camera.height, camera.width), np.float32)
    planes = {}
    for index, plane, window in _visible(surfaces, T_cam_world, rays):
        planes[index] = plane
        length_u, length_v = surfaces[index].size_m
        inverse_depth = _linear(plane.inverse_depth, rays, window)
        u, v = _linear(plane.u, rays, window), _linear(plane.v, rays, window)
        seam = SEAM_M * inverse_depth
        seen = (inverse_depth > buffer[window]) & (u >= -seam) & (v >= -seam)
        seen &= u <= length_u * inverse_depth + seam
        seen &= v <= length_v * inverse_depth + seam
        np.copyto(buffer[window], inverse_depth, where=seen)
        nearest[window][seen] = index
    return nearest, buffer, planes


def shade(surface: Surface, levels: list[NDArray], plane: _Plane, camera: Camera,
          window: tuple[slice, slice]) -> NDArray:
    """Texture of a surface over a window of pixels, uint8 [h, w, 3], filtered to their footprint.

    Pixels of the window that do not see the surface get meaningless colours.
    """
    rays = rays_of(camera)
    with np.errstate(divide='ignore', invalid='ignore'):
        z = 1 / _linear(plane.inverse_depth, rays, window)
        u = _linear(plane.u, rays, window) * z / np.float32(surface.size_m[0])
        v = _linear(plane.v, rays, window) * z / np.float32(surface.size_m[1])
        # A pixel covers r^2 z^2 / (f d) metres along the slope, for a ray (x, y, 1) of length
        # r and a plane at distance d: z r / f across the ray, over the cosine of incidence.
        texels_per_m = levels[0].shape[1] / surface.size_m[0]
        factor = np.float32(texels_per_m / (camera.fx * plane.distance))
        footprint = factor * z * z * (1 + rays.x[window]**2 + rays.y[window]**2)
        level = np.log2(footprint) + np.float32(LEVEL_BIAS)
    level = np.clip(np.nan_to_num(level), 0, len(levels) - 1)
    return _trilinear(levels, np.nan_to_num(u), np.nan_to_num(v), level)


def _trilinear(levels: list[NDArray], u: NDArray, v: NDArray, level: NDArray
               ) -> NDArray:
    """Colours at u, v in 0..1 (of width, height), blended between neighbouring levels."""
    first, last = int(level.min()), int(np.ceil(level.max()))
    image = _bilinear(levels[first], u, v)
    for index in range(first + 1, last + 1):
        weight = np.clip(level - (index - 1), 0, 1)
        image = cv2.blendLinear(image, _bilinear(levels[index], u, v), 1 - weight, weight)
    return image


def _bilinear(texture: NDArray, u: NDArray, v: NDArray) -> NDArray:
    h, w = texture.shape[:2]
    x, y = u * np.float32(w) - np.float32(0.5), v * np.float32(h) - np.float32(0.5)
    return cv2.remap(texture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def smooth_edges(image: NDArray[np.uint8], nearest: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Blur the pixels on either side of a change of surface: lenses do not alias edges."""
    edge = np.zeros(nearest.shape, np.uint8)
    across = nearest[:, 1:] != nearest[:, :-1]
    down = nearest[1:] != nearest[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    blurred = cv2.GaussianBlur(image, (3, 3), 0.7)
    cv2.copyTo(blurred, edge, image)
    return image
