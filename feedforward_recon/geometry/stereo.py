"""Two cameras side by side: checks, rectification, and depth from disparity.

Rectified images look along one direction, and their rows correspond: a point at depth z lies
f b / z pixels farther left in the right image, b being the baseline (Hartley and Zisserman,
"Multiple View Geometry", 2004, section 11.12). The left camera keeps its frame: only the search
for the other pixel happens in rectified images, depths are those of the left camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, make_transform

GrayImage = NDArray[np.uint8]
MIN_BASELINE_M = 1e-3
# Rows and axes that agree to this are rectified: at the border of an image of 2000 px a turn by
# 1e-5 moves a row by 0.02 px.
SAME_DIRECTION, SAME_ROW_PX = 1e-5, 0.02
CLOSE_TO_SIDE = 0.7  # cosine: a right camera is beside the left one, not above or before it


@dataclass(frozen=True, eq=False)
class StereoRig:
    """A left and a right camera; T_left_right [4, 4] maps points of the right to the left camera.

    Lengths in metres. Raises InputError for a pair that cannot be matched.
    """

    left: Camera
    right: Camera
    T_left_right: np.ndarray

    def __post_init__(self) -> None:
        """Refuse two sizes, no baseline, and a right camera that is not on the right."""
        if self.left.size_wh != self.right.size_wh:
            raise InputError(f'expected left and right images of one size, found '
                             f'{self.left.width}x{self.left.height} and '
                             f'{self.right.width}x{self.right.height}; use the same resolution')
        baseline = self.T_left_right[:3, 3]
        if not np.isfinite(self.T_left_right).all() or self.baseline_m < MIN_BASELINE_M:
            raise InputError('expected cameras at least 1 mm apart, found a baseline of '
                             f'{self.baseline_m:.4g} m; calibrate the pair, or publish P of the '
                             'right camera with its baseline (P[3] = -fx * baseline)')
        if baseline[0] < 0:
            raise InputError(f'expected the right camera to the right of the left one, found it '
                             f'{-baseline[0]:.3g} m to its left; swap the images or the sign of '
                             'the baseline')
        if baseline[0] < CLOSE_TO_SIDE * self.baseline_m:
            x, y, z = baseline
            raise InputError(f'expected the right camera beside the left one, found it at '
                             f'({x:.3g}, {y:.3g}, {z:.3g}) m; turn the images, or give two '
                             'cameras that stand side by side')

    @property
    def baseline_m(self) -> float:
        """Distance between the two cameras."""
        return float(np.linalg.norm(self.T_left_right[:3, 3]))

    @property
    def focal_px(self) -> float:
        """Of the rectified images."""
        return self.left.fx

    @property
    def gain_px(self) -> float:
        """Pixels of disparity per 1/m of inverse depth."""
        return self.focal_px * self.baseline_m

    @cached_property
    def is_rectified(self) -> bool:
        """Rows of the images as they come correspond."""
        left, right, T = self.left, self.right, self.T_left_right
        same = max(abs(left.fx - right.fx), abs(left.fy - right.fy), abs(left.cy - right.cy))
        turned = max(np.abs(T[:3, :3] - np.eye(3)).max(), np.abs(T[1:3, 3]).max() / T[0, 3])
        return not (left.is_distorted or right.is_distorted) and same < SAME_ROW_PX \
            and turned < SAME_DIRECTION

    def rectified(self, left: GrayImage, right: GrayImage) -> tuple[GrayImage, GrayImage]:
        """Gray images uint8 [H, W] whose rows correspond; as they are if they do already."""
        if self.is_rectified:
            return left, right
        left, right = (np.asarray(cv2.remap(image, first, second, cv2.INTER_LINEAR), np.uint8)
                       for image, (first, second) in zip((left, right), self._maps, strict=True))
        return left, right

    def rectified_px(self, px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [N, 2] of the left image in the rectified one, and how depth changes [N].

        The depth in the left camera is that along the rectified axis over the second value.
        """
        if self.is_rectified:
            return np.asarray(px, float), np.ones(len(px))
        xy = self.left.normalise(px)
        rays = np.column_stack([xy, np.ones(len(xy))]) @ self._R_rect_left.T
        z = np.maximum(rays[:, 2], 1e-6)
        f, (cx, cy) = self.focal_px, self._centre
        return rays[:, :2] / z[:, None] * f + (cx, cy), z

    def depth(self, disparity_px: np.ndarray, z_ray: np.ndarray) -> np.ndarray:
        """z-depth [N] in the left camera of disparities [N] > 0 in the rectified images.

        z_ray: second value of ``rectified_px``.
        """
        return self.gain_px / (disparity_px * z_ray)

    def calibration(self, *, right: bool) -> tuple[np.ndarray, np.ndarray]:
        """R [3, 3] and P [3, 4] of one camera, as sensor_msgs/CameraInfo has them."""
        if self.is_rectified:
            camera = self.right if right else self.left
            R, P = np.eye(3), np.c_[camera.K, np.zeros(3)]
        else:
            R = self._turned()[right][1]
            P = np.zeros((3, 4))
            P[0, 0] = P[1, 1] = self.focal_px
            P[:2, 2], P[2, 2] = self._centre, 1
        if right:
            P[0, 3] = -P[0, 0] * self.baseline_m
        return R, P

    @property
    def shift_px(self) -> float:
        """Disparity of a point infinitely far away: principal points may differ."""
        return self.left.cx - self.right.cx if self.is_rectified else 0.0

    # -- of a pair that is not rectified -------------------------------------------------------

    @cached_property
    def _R_rect_left(self) -> np.ndarray:
        """Turns the left camera: x along the baseline, z between the two optical axes."""
        x = self.T_left_right[:3, 3] / self.baseline_m
        forward = np.array([0, 0, 1.0]) + self.T_left_right[:3, 2]
        y = np.cross(forward, x)
        y /= np.linalg.norm(y)
        return np.stack([x, y, np.cross(x, y)])

    @cached_property
    def _centre(self) -> tuple[float, float]:
        """Principal point that keeps the middles of both images about where they are."""
        found = []
        for camera, R_rect_cam in self._turned():
            middle = camera.normalise(np.array([[camera.width - 1, camera.height - 1]]) / 2)
            ray = R_rect_cam @ np.append(middle[0], 1)
            found.append((np.array(camera.size_wh) - 1) / 2 - self.focal_px * ray[:2] / ray[2])
        x, y = np.mean(found, 0)
        return float(x), float(y)

    def _turned(self) -> list[tuple[Camera, np.ndarray]]:
        return [(self.left, self._R_rect_left),
                (self.right, self._R_rect_left @ self.T_left_right[:3, :3])]

    @cached_property
    def _maps(self) -> list[Any]:
        """Where each rectified pixel is in the left and in the right image, as cv2.remap asks."""
        (width, height), (cx, cy) = self.left.size_wh, self._centre
        v, u = np.mgrid[:height, :width]
        rays = np.stack([(u - cx) / self.focal_px, (v - cy) / self.focal_px,
                         np.ones(u.shape)], -1).reshape(-1, 3)
        maps = []
        for camera, R_rect_cam in self._turned():
            px = np.nan_to_num(camera.project(rays @ R_rect_cam), nan=-1.0)
            u_map, v_map = px.astype(np.float32).T.reshape(2, height, width)
            maps.append(cv2.convertMaps(u_map, v_map, cv2.CV_16SC2))
        return maps


def from_rectification(R_left: np.ndarray, R_right: np.ndarray, baseline_m: float) -> np.ndarray:
    """T_left_right [4, 4] from the rotations that rectify both cameras, as CameraInfo has them.

    R_left, R_right: [3, 3], rectified <- camera.
    """
    T_rect_left = make_transform(R_left, np.zeros(3))
    T_rect_right = make_transform(R_right, np.array([baseline_m, 0, 0]))
    return inverse(T_rect_left) @ T_rect_right
