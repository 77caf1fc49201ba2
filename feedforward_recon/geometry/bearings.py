"""``Bearings``: what was seen once, at a depth that nobody knows yet, holds the next pose still.

A landmark without a point lies somewhere along the bearing under which it was first seen. From
another place its image may be anywhere along the epipolar line, and says nothing of how far the
camera went; across that line it is as exact as any other. While the camera has hardly moved, that
line is short, and the bearing holds the rotation in both directions. The depth is eliminated with
a prior on its inverse (Civera et al., "Inverse Depth Parametrization for Monocular SLAM", 2008).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feedforward_recon.geometry.bundle_rows import MIN_DEPTH


@dataclass(frozen=True)
class Bearings:
    """M bearings, and where they are seen now.

    origins: camera centres, map frame [3, M]; directions: [3, M], map frame, of z = 1 in the
    camera that saw them; target: normalised coordinates in the camera to be found [2, M].
    inv_depth: expected 1/z in the camera that saw them, and its standard deviation too: anything
    from twice as near to infinitely far.
    """

    origins: np.ndarray
    directions: np.ndarray
    target: np.ndarray
    inv_depth: float

    def seen_from(self, T_cam_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In a camera at T_cam_map [4, 4]: points, slides, and which of them are in front.

        Points p [3, M] at the expected depth; slide [2, M]: by how much their normalised
        coordinates move with one standard deviation of the inverse depth.
        """
        R, t = T_cam_map[:3, :3], T_cam_map[:3, 3:]
        offset = (R @ self.origins + t) * self.inv_depth
        p = R @ self.directions + offset
        front = p[2] > MIN_DEPTH
        p = np.where(front, p, [[0.0], [0.0], [1.0]])
        slide = (offset[:2] - p[:2] / p[2] * offset[2]) / p[2]
        return p / self.inv_depth, slide, front


def across(rows: np.ndarray, slide: np.ndarray) -> np.ndarray:
    """Rows [.., 2, M] of pixel noise 1, whitened for ``slide`` [2, M] more along one direction.

    The noise is I + s s^T; its inverse root takes s s^T rows / (n (n + 1)) away, n^2 = 1 + s^T s.
    """
    n = np.sqrt(1 + (slide**2).sum(0))
    return rows - slide * (slide * rows).sum(-2, keepdims=True) / (n * (n + 1))
