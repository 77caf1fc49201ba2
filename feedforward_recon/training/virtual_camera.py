"""Views of a photo through another camera at the same place: straight, cut, zoomed and turned.

A turn about the optical centre moves pixels but shows nothing new, so a photo gives exact views of
many cameras (a homography). Lens distortion goes on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from feedforward_recon.geometry.camera import Camera

MAX_ZOOM = 1.45
TILT_RAD, ROLL_RAD = 0.03, 0.07  # standard deviations from view to view
WINDOW_ROLL_RAD = 0.12  # of all views of a window together
SHIFT = 0.4  # standard deviation of the cut, of what there is to cut on one side
ONE_ZOOM_SHARE = 0.7  # of windows whose views have one focal length


@dataclass(frozen=True)
class VirtualCamera:
    """A camera without distortion at the place of a real one.

    K: [3, 3], pixel centres at integers. R_virtual_real: [3, 3]. size_wh: pixels.
    """

    K: np.ndarray
    R_virtual_real: np.ndarray
    size_wh: tuple[int, int]

    def looked_through(self, image: np.ndarray, real: Camera) -> np.ndarray:
        """What this camera sees of an image [H, W, 3] of the real one; mirrored beyond it."""
        maps = cv2.initUndistortRectifyMap(real.K, np.array(real.distortion), self.R_virtual_real,
                                           self.K, self.size_wh, cv2.CV_32FC1)
        return np.asarray(cv2.remap(image, *maps, cv2.INTER_LINEAR,
                                    borderMode=cv2.BORDER_REFLECT), np.uint8)

    def seen(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels [M, 2] and depth [M] of points [M, 3] of the real camera; which are visible."""
        own = points @ self.R_virtual_real.T
        front = own[:, 2] > 1e-6
        z = np.where(front, own[:, 2], 1.0)
        px = own[:, :2] / z[:, None] * self.K[[0, 1], [0, 1]] + self.K[:2, 2]
        inside = (px >= 0).all(1) & (px <= np.array(self.size_wh) - 1).all(1)
        return px, z, front & inside

    def pose(self, T_world_real: np.ndarray) -> np.ndarray:
        """T_world_virtual [4, 4] of the pose of the real camera."""
        T = T_world_real.copy()
        T[:3, :3] = T[:3, :3] @ self.R_virtual_real.T
        return T


@dataclass(frozen=True)
class Variation:
    """How the cameras of one window differ from the real ones.

    roll_rad: of all of them. zoom: of all of them, or None where each has its own.
    """

    roll_rad: float
    zoom: float | None

    @staticmethod
    def drawn(rng: np.random.Generator) -> Variation:
        """That of one training window."""
        zoom = _zoom(rng) if rng.random() < ONE_ZOOM_SHARE else None
        return Variation(float(rng.normal(0, WINDOW_ROLL_RAD)), zoom)


def whole_view(real: Camera, size_wh: tuple[int, int]) -> VirtualCamera:
    """The view that shows the most of an image at a size, as it is."""
    return _cut(real, size_wh, 1.0, np.zeros(2), np.eye(3))


def varied_view(real: Camera, size_wh: tuple[int, int], how: Variation, rng: np.random.Generator
                ) -> VirtualCamera:
    """A random view of the real camera's image."""
    zoom = _zoom(rng) if how.zoom is None else how.zoom
    turn = np.array([rng.normal(0, TILT_RAD), rng.normal(0, TILT_RAD),
                     how.roll_rad + rng.normal(0, ROLL_RAD)])
    shift = np.clip(rng.normal(0, SHIFT, 2), -1, 1)
    return _cut(real, size_wh, zoom, shift, cv2.Rodrigues(turn)[0])


def _zoom(rng: np.random.Generator) -> float:
    return float(1 + (MAX_ZOOM - 1) * rng.random() ** 2)  # mostly little: photos are small


def _cut(real: Camera, size_wh: tuple[int, int], zoom: float, shift: np.ndarray, R: np.ndarray
         ) -> VirtualCamera:
    """shift: where the cut lies, from -1 to 1 of the margin on both sides."""
    size, whole = np.array(size_wh, float), np.array(real.size_wh, float)
    scale = zoom * float((size / whole).max())
    margin = np.maximum(scale * whole - size, 0) / 2
    K = real.K.copy()
    K[[0, 1], [0, 1]] *= scale
    K[:2, 2] = (K[:2, 2] + 0.5) * scale - 0.5 - (scale * whole - size) / 2 + shift * margin
    return VirtualCamera(K, R, size_wh)
