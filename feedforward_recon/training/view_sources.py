"""What training windows are drawn from: views of a scene, whatever it was read from.

Every source says the same of a view: an image, its camera, and scene points that it shows at known
depths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.training.virtual_camera import VirtualCamera


@dataclass(frozen=True)
class SeenPoints:
    """Points that a view shows: pixels [M, 2], z-depth [M], and keys [M, ...].

    keys: what their source finds them in other views by.
    """

    pixels: np.ndarray
    depth: np.ndarray
    keys: np.ndarray


class ViewSource(Protocol):
    """Views of one scene."""

    @property
    def name(self) -> str:
        """That of its folder or file."""
        ...

    @property
    def size_wh(self) -> tuple[int, int]:
        """Pixels of its images."""
        ...

    def window(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """Numbers of so many views that overlap, the world's first; None if there are none."""
        ...

    def camera(self, view: int) -> Camera:
        """The real camera of a view."""
        ...

    def pose(self, view: int) -> np.ndarray:
        """T_world_cam [4, 4]."""
        ...

    def image(self, view: int) -> np.ndarray:
        """RGB uint8 [H, W, 3]."""
        ...

    def points(self, view: int, through: VirtualCamera, count: int, rng: np.random.Generator
               ) -> SeenPoints:
        """At most ``count`` points that a virtual camera at this view's place shows."""
        ...

    def found(self, view: int, through: VirtualCamera, keys: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [M, 2] of points with keys [M, ...] in a virtual camera; seen there: bool [M]."""
        ...
