"""Views whose depth is known everywhere: rooms that were rendered, and RGB-D recordings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.synthetic.covisibility import PosedDepth
from feedforward_recon.training.covisible_views import CovisibleViews, seen_shares
from feedforward_recon.training.view_sources import SeenPoints
from feedforward_recon.training.virtual_camera import VirtualCamera

SAME_DEPTH = 0.05  # share by which depths of one point differ
COARSE_WH = (32, 24)  # pixels by which it is found out what views share
MIN_SHARED = 0.15  # of what two views show, the mean of both; less leaves a walk in pieces


@dataclass(frozen=True)
class DepthView:
    """One view: RGB uint8 [H, W, 3], z-depth [H, W] in metres, 0 where unknown, T_world_cam.

    moving: bool [H, W], what is elsewhere in other views; None where everything stands still.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.floating]
    camera: Camera
    T_world_cam: NDArray[np.floating]
    moving: NDArray[np.bool_] | None = None

    def still_depth(self, at: tuple[NDArray, NDArray] | tuple[slice, slice]) -> NDArray:
        """Depth at (rows, columns) of what stands still, 0 where it is unknown or moves."""
        depth = self.depth[at]
        return depth if self.moving is None else np.where(self.moving[at], 0, depth)

    def points(self, through: VirtualCamera, count: int, rng: np.random.Generator) -> SeenPoints:
        """Random points that stand still; their keys are points in the world."""
        height, width = self.depth.shape
        px = np.column_stack([rng.integers(width, size=2 * count),
                              rng.integers(height, size=2 * count)])
        z = self.still_depth((px[:, 1], px[:, 0])).astype(float)
        own = self.camera.unproject(px.astype(float), z)
        pixels, z, visible = through.seen(own)
        kept = np.flatnonzero(visible)[:count]
        return SeenPoints(pixels[kept], z[kept], transform_points(self.T_world_cam, own[kept]))

    def found(self, through: VirtualCamera, keys: NDArray) -> tuple[NDArray, NDArray]:
        """By projection, where depth agrees: nothing lies, and nothing moves, before the point."""
        own = transform_points(inverse(self.T_world_cam), keys)
        pixels, _, visible = through.seen(own)
        safe = np.where(own[:, 2:] > 1e-6, own, (0.0, 0.0, 1.0))
        u, v = self.camera.project(safe).round().astype(int).T
        height, width = self.depth.shape
        inside = visible & (u >= 0) & (v >= 0) & (u < width) & (v < height)
        there = self.still_depth((np.where(inside, v, 0), np.where(inside, u, 0)))
        return pixels, inside & (np.abs(there - own[:, 2]) < SAME_DEPTH * own[:, 2])


class DepthViews(Protocol):
    """Views of one scene, of one size, each read when it is asked for."""

    def __len__(self) -> int:
        """Number of views."""
        ...

    def view(self, index: int) -> DepthView:
        """One of them."""
        ...


class DepthSource:
    """A `ViewSource` of views with depth."""

    def __init__(self, name: str, views: DepthViews) -> None:
        self._name, self._views = name, views

    @property
    def name(self) -> str:
        """See ``ViewSource``."""
        return self._name

    @cached_property
    def size_wh(self) -> tuple[int, int]:
        """Pixels of its images."""
        return self._views.view(0).camera.size_wh

    @cached_property
    def covisible(self) -> CovisibleViews:
        """Views that see the same things, from depth on a coarse grid."""
        coarse = _coarse(self._views)
        share = seen_shares(coarse)
        depth = [float(d[d > 0].median()) if (d > 0).any() else np.inf for d in coarse.depth]
        return CovisibleViews.of(share + share.T > 2 * MIN_SHARED, coarse.T_world_cam.numpy(),
                                 np.array(depth))

    def window(self, rng: np.random.Generator, count: int) -> NDArray | None:
        """See ``ViewSource``; neighbours differ by an angle within ``ANGLE_DEG``."""
        return self.covisible.drawn(rng, count)

    def camera(self, view: int) -> Camera:
        """See ``ViewSource``."""
        return self._views.view(view).camera

    def pose(self, view: int) -> NDArray:
        """See ``ViewSource``."""
        return self._views.view(view).T_world_cam

    def image(self, view: int) -> NDArray:
        """See ``ViewSource``."""
        return self._views.view(view).image

    def depth(self, view: int) -> NDArray:
        """Metres [H, W]."""
        return self._views.view(view).depth

    def points(self, view: int, through: VirtualCamera, count: int, rng: np.random.Generator
               ) -> SeenPoints:
        """See ``DepthView``."""
        return self._views.view(view).points(through, count, rng)

    def found(self, view: int, through: VirtualCamera, keys: NDArray
              ) -> tuple[NDArray, NDArray]:
        """See ``DepthView``."""
        return self._views.view(view).found(through, keys)


def _coarse(views: DepthViews) -> PosedDepth:
    """The middle pixels of a grid of all views; what moves counts as unknown.

    Lenses count as straight: it matters which views meet, not where to a pixel.
    """
    depth, K, poses = [], [], []
    for view in map(views.view, range(len(views))):
        step = np.maximum(np.array(view.camera.size_wh) // COARSE_WH, 1)
        first = step // 2
        depth.append(view.still_depth((slice(first[1], None, step[1]),
                                       slice(first[0], None, step[0]))).astype(np.float32))
        matrix = view.camera.K
        matrix[:2, 2] -= first
        matrix[:2] /= step[:, None]
        K.append(matrix.astype(np.float32))
        poses.append(view.T_world_cam)
    return PosedDepth(*(torch.from_numpy(np.stack(x)) for x in (depth, K, poses)))
