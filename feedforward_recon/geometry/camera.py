"""A pinhole camera with the distortion models that ROS and OpenCV name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.radial import bent, straightened
from feedforward_recon.geometry.transforms import inverse, transform_points

DISTORTION_COUNTS = {'plumb_bob': (0, 4, 5), 'rational': (8,), 'fisheye': (4,)}


@dataclass(frozen=True)
class Camera:
    """Intrinsics of one image size.

    width, height: pixels. fx, fy, cx, cy: pixels; pixel centres lie at integers, so the
    middle of an image of width w is (w - 1) / 2.
    distortion: OpenCV order; plumb_bob k1 k2 p1 p2 [k3], rational k1 k2 p1 p2 k3..k6,
    fisheye (equidistant) k1..k4. Empty means none.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, ...] = ()
    model: str = 'plumb_bob'

    def __post_init__(self) -> None:
        """Refuse intrinsics that no camera has."""
        if self.model not in DISTORTION_COUNTS:
            raise InputError(f'expected a distortion model of {sorted(DISTORTION_COUNTS)}, '
                             f'found {self.model!r}; rectify the images or convert the model')
        if len(self.distortion) not in (0, *DISTORTION_COUNTS[self.model]):
            raise InputError(
                f'expected {DISTORTION_COUNTS[self.model]} coefficients for {self.model}, '
                f'found {len(self.distortion)}; check the calibration')
        values = (self.fx, self.fy, self.cx, self.cy, *self.distortion)
        if not np.all(np.isfinite(values)) or min(self.fx, self.fy) <= 0:
            raise InputError(f'expected positive finite focal lengths, found fx={self.fx} '
                             f'fy={self.fy}; calibrate the camera or give --fov')
        if min(self.width, self.height) < 1:
            raise InputError(f'expected a positive image size, found {self.width}x{self.height}')

    @staticmethod
    def from_matrix(K: np.ndarray, size_wh: tuple[int, int],
                    distortion: tuple[float, ...] = (), model: str = 'plumb_bob') -> Camera:
        """Camera of a matrix K [3, 3] at an image size (width, height)."""
        K = np.asarray(K, float)
        return Camera(int(size_wh[0]), int(size_wh[1]), float(K[0, 0]), float(K[1, 1]),
                      float(K[0, 2]), float(K[1, 2]), tuple(map(float, distortion)), model)

    @staticmethod
    def from_fields(values: Mapping[str, Any]) -> Camera:
        """Camera of its fields by name, as files have them; raises TypeError for other names."""
        return Camera(**{**values, 'distortion': tuple(values['distortion'])})

    @staticmethod
    def from_fov(horizontal_fov_deg: float, size_wh: tuple[int, int]) -> Camera:
        """Undistorted camera with square pixels and the principal point in the middle."""
        if not 1.0 <= horizontal_fov_deg < 179.0:
            raise InputError('expected a horizontal field of view of 1..179 degrees, found '
                             f'{horizontal_fov_deg}')
        width, height = size_wh
        focal_px = float(0.5 * width / np.tan(0.5 * np.deg2rad(horizontal_fov_deg)))
        return Camera(width, height, focal_px, focal_px, (width - 1) / 2, (height - 1) / 2)

    @property
    def K(self) -> np.ndarray:
        """Matrix of intrinsics [3, 3]."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])

    @property
    def size_wh(self) -> tuple[int, int]:
        """Image size (width, height)."""
        return self.width, self.height

    @property
    def is_distorted(self) -> bool:
        """True when any distortion coefficient is not zero."""
        return any(self.distortion)

    @property
    def radial(self) -> tuple[float, ...] | None:
        """Coefficients k1, k2, .. of a lens that bends only so, () without any; else None."""
        if not self.is_distorted:
            return ()
        k1, k2, p1, p2, *k3 = self.distortion
        return None if self.model != 'plumb_bob' or p1 or p2 else (k1, k2, *k3)

    def with_lens(self, focal_scale: float, radial: float) -> Camera:
        """The camera with a focal length times ``focal_scale``, and k1 more by ``radial``.

        radial: as in ``geometry.refine``; of a plumb_bob model.
        """
        k1, *rest = self.distortion or (0.0,) * 4
        distortion = (k1 * focal_scale**2 + radial, *rest)
        return replace(self, fx=self.fx * focal_scale, fy=self.fy * focal_scale,
                       distortion=distortion if radial or self.distortion else ())

    def with_distortion_of(self, other: Camera) -> Camera:
        """``other``, if it is this camera but for a distortion, and this one says it has none."""
        same = replace(other, distortion=()) == replace(self, distortion=())
        return other if same and not self.is_distorted else self

    def resized(self, size_wh: tuple[int, int]) -> Camera:
        """The camera of the image resized to (width, height) with cv2.resize's convention."""
        sx, sy = size_wh[0] / self.width, size_wh[1] / self.height
        return replace(self, width=int(size_wh[0]), height=int(size_wh[1]), fx=self.fx * sx,
                       fy=self.fy * sy, cx=(self.cx + 0.5) * sx - 0.5,
                       cy=(self.cy + 0.5) * sy - 0.5)

    def cropped(self, left: int, top: int, size_wh: tuple[int, int]) -> Camera:
        """The camera of the window of (width, height) whose corner pixel is (left, top)."""
        return replace(self, width=int(size_wh[0]), height=int(size_wh[1]),
                       cx=self.cx - left, cy=self.cy - top)

    def project(self, points_cam: np.ndarray) -> np.ndarray:
        """Pixels [N, 2] of camera-frame points [N, 3]; NaN where z <= 0."""
        points = np.asarray(points_cam, float).reshape(-1, 3)
        front = points[:, 2] > 1e-9
        pixels = np.full((len(points), 2), np.nan)
        if self.radial is not None:
            p = points[front]
            pixels[front] = (bent(p[:, :2] / p[:, 2:], self.radial) * (self.fx, self.fy)
                             + (self.cx, self.cy))
        elif front.any():
            project = cv2.fisheye.projectPoints if self.model == 'fisheye' else cv2.projectPoints
            zero = np.zeros(3)
            args = (points[front][:, None], zero, zero, self.K, np.array(self.distortion))
            pixels[front] = project(*args)[0].reshape(-1, 2)
        return pixels

    def shift_px(self, T_before: np.ndarray, T_after: np.ndarray, points: np.ndarray) -> float:
        """How far points [N, 3] move in the image between two poses T_map_cam, as a median.

        Of those in view from ``T_after``; infinite if none is.
        """
        before, after = (self.project(transform_points(inverse(T), points))
                         for T in (T_before, T_after))
        with np.errstate(invalid='ignore'):
            inside = np.all((after > 0) & (after < np.array(self.size_wh)), axis=1)
            moved = np.linalg.norm(after - before, axis=1)[inside]
        known = moved[np.isfinite(moved)]
        return float(np.median(known)) if len(known) else np.inf

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Undistorted normalised coordinates [N, 2] (x/z, y/z) of pixels [N, 2]."""
        pixels = np.asarray(pixels, float).reshape(-1, 2)
        if self.radial is not None:
            return straightened((pixels - (self.cx, self.cy)) / (self.fx, self.fy), self.radial)
        if not len(pixels):
            return pixels
        distortion = np.array(self.distortion)
        if self.model == 'fisheye':
            return cv2.fisheye.undistortPoints(pixels[:, None], self.K, distortion).reshape(-1, 2)
        xy = cv2.undistortPoints(pixels[:, None], self.K, distortion).reshape(-1, 2)
        return self._polished(xy, pixels, distortion)

    def _polished(self, xy: np.ndarray, pixels: np.ndarray, distortion: np.ndarray) -> np.ndarray:
        """Newton steps on undistorted xy [N, 2]: OpenCV stops early, up to a third of a pixel."""
        for _ in range(3):
            points = np.concatenate([xy, np.ones((len(xy), 1))], 1)[:, None]
            zero = np.zeros(3)
            projected, jacobian = cv2.projectPoints(points, zero, zero, self.K, distortion)
            error = pixels - projected.reshape(-1, 2)
            (a, b), (c, d) = np.moveaxis(jacobian.reshape(-1, 2, jacobian.shape[1])[:, :, 3:5],
                                         0, -1)  # by the translation, which moves x and y
            step = np.stack([d * error[:, 0] - b * error[:, 1],
                             a * error[:, 1] - c * error[:, 0]], 1)
            determinant = a * d - b * c
            # Where the model folds over no pixel has an answer: keep OpenCV's, do not jump.
            safe = determinant > 0.05 * self.fx * self.fy
            xy = xy + np.where(safe[:, None], step / np.where(safe, determinant, 1.0)[:, None], 0)
        return xy

    def unproject(self, pixels: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Camera-frame points [N, 3] of pixels [N, 2] at z-depths [N]."""
        xy = self.normalise(pixels)
        return np.concatenate([xy, np.ones((len(xy), 1))], 1) * np.reshape(depth, (-1, 1))
