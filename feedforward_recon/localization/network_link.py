"""The similarity between the world of a network and a map, and what it makes of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    pose_error,
    transform_points,
)
from feedforward_recon.types import FloatArray, Frame, Prediction

MIN_CAMERAS = 3  # a similarity has seven unknowns, two cameras on a line leave a turn free
# Share by which the depth of a network may differ from that of a landmark that it confirms: wide,
# because the depth of a network is rough; chosen by hand.
SAME_DEPTH = 0.2
# Rms errors, of the typical depth and in radians (20 degrees), above which an answer is no better
# than naming the room; chosen by hand.
USABLE_POSITION, USABLE_ANGLE = 0.3, 0.35
USABLE_AGREEMENT = 0.3  # share of landmarks that the depth must confirm; chosen by hand
ITERATIONS = 20  # of reweighting; chosen by hand, it converges in fewer
MAD_TO_STD = 1.4826  # standard deviation of normal errors over their median absolute value
STILL = ('expected cameras that move alike in the map and in the world of the network, found '
         'none; use a walk that moves, or other weights')


@dataclass(frozen=True)
class NetworkLink:
    """How the world of a network's state lies in a map: x_map = T_map_net (scale * x_net).

    T_map_net: rows of the 4x4 matrix. scale_source: 'cameras' or 'depth', whichever answered
    better. keyframes: images written. fit_position, fit_angle: rms of what their cameras differ
    by after the fit (map units, radians). checked: images queried afterwards; position, angle:
    rms error of their answers; agreement: median share of the landmarks in their view that their
    depth confirmed; novelty: the largest of them (see ``SceneNetwork``).
    depth: typical depth of the map, map units.
    """

    T_map_net: tuple[tuple[float, ...], ...]
    scale: float
    scale_source: str
    keyframes: int
    depth: float
    fit_position: float = 0.0
    fit_angle: float = 0.0
    checked: int = 0
    position: float = 0.0
    angle: float = 0.0
    agreement: float = 0.0
    novelty: float = 0.0

    def pose(self, T_net_cam: FloatArray) -> FloatArray:
        """Poses [..., 4, 4] of the network's world in the map."""
        moved = np.array(T_net_cam, float)
        moved[..., :3, 3] *= self.scale
        return np.array(self.T_map_net) @ moved

    @property
    def covariance(self) -> FloatArray:
        """Of an answer [6, 6], as images of the walk were answered."""
        return np.diag(np.repeat((self.position**2 / 3, self.angle**2 / 3), 3))

    @property
    def recognised(self) -> bool:
        """False when answers to images of the walk itself are too far off to be of use.

        Or when cameras and depth differ in their unit, so that neither confirms the other.
        """
        return (self.position < USABLE_POSITION * self.depth and self.angle < USABLE_ANGLE
                and self.agreement > USABLE_AGREEMENT)


def align_cameras(T_net_cam: FloatArray, T_map_cam: FloatArray, scale: float | None = None
                  ) -> tuple[FloatArray, float]:
    """The similarity (T_map_net, scale) between N cameras in two worlds, robust to outliers.

    T_net_cam, T_map_cam: [N, 4, 4]. The rotation comes from the orientations, so a straight walk
    determines it too; the origin and, unless it is given, the scale from the centres, as in
    Procrustes alignment. Iteratively re-weighted, Cauchy weights on both (see
    ``geometry.align``).
    Raises DegenerateError for fewer than ``MIN_CAMERAS`` cameras, or when they stay in place
    and no scale is given.
    """
    if len(T_net_cam) < MIN_CAMERAS:
        raise DegenerateError(f'expected at least {MIN_CAMERAS} cameras, found '
                              f'{len(T_net_cam)}; map a longer walk')
    size = _longer_ratio(T_net_cam, T_map_cam) if scale is None else scale
    R = _rotation(T_net_cam, T_map_cam, np.ones(len(T_net_cam)))
    offsets = T_map_cam[:, :3, 3] - size * T_net_cam[:, :3, 3] @ R.T
    T = make_transform(R, np.median(offsets, 0))
    for _ in range(ITERATIONS):
        moved = T_net_cam.copy()
        moved[:, :3, 3] *= size
        distance, angle = pose_error(T @ moved, T_map_cam)
        weight = 1 / (1 + _squared(distance) + _squared(angle))
        T, size = _fit(T_net_cam, T_map_cam, weight / weight.sum(), scale)
    return T, size


def _longer_ratio(T_net_cam: FloatArray, T_map_cam: FloatArray) -> float:
    """Median ratio of the longer distances between cameras."""
    i, j = np.triu_indices(len(T_net_cam), 1)
    net, target = (np.linalg.norm(T[i, :3, 3] - T[j, :3, 3], axis=1)
                   for T in (T_net_cam, T_map_cam))
    far = (target >= np.median(target)) & (net > 0)
    if not far.any() or not target[far].all():
        raise DegenerateError(STILL)
    return float(np.median(target[far] / net[far]))


def _fit(T_net_cam: FloatArray, T_map_cam: FloatArray, share: np.ndarray, scale: float | None
         ) -> tuple[FloatArray, float]:
    R = _rotation(T_net_cam, T_map_cam, share)
    source, target = T_net_cam[:, :3, 3] @ R.T, T_map_cam[:, :3, 3]
    mean_source, mean_target = share @ source, share @ target
    source, target = source - mean_source, target - mean_target
    if scale is None:
        along = float(share @ np.sum(source * target, 1))
        if along <= 0:
            raise DegenerateError(STILL)
        scale = along / float(share @ np.sum(source**2, 1))
    return make_transform(R, mean_target - scale * mean_source), scale


def _rotation(T_net_cam: FloatArray, T_map_cam: FloatArray, share: np.ndarray) -> np.ndarray:
    """Weighted chordal mean [3, 3] of the rotations between orientations (Hartley et al. 2013)."""
    rotations = T_map_cam[:, :3, :3] @ np.swapaxes(T_net_cam[:, :3, :3], -1, -2)
    U, _, Vt = np.linalg.svd(np.einsum('n,nij->ij', share, rotations))
    return U @ np.diag((1, 1, np.sign(np.linalg.det(U @ Vt)))) @ Vt


def _squared(errors: np.ndarray) -> np.ndarray:
    """Squares of errors as multiples of their typical size."""
    typical = MAD_TO_STD * float(np.median(errors))
    return (errors / max(typical, 1e-6))**2


def depth_agreement(prediction: Prediction, link: NetworkLink, camera: Camera | None,
                    points: FloatArray) -> tuple[float, int]:
    """Share of the map's landmarks in view whose depth the network confirms, and their number.

    The landmarks were measured without the network's camera head, and the depth head does not
    know the pose: both agree only where the pose is right.
    """
    ratio = _depth_ratios(prediction, 0, link.pose(prediction.T_world_cam[0]), camera, points)
    confirmed = np.abs(ratio / link.scale - 1) < SAME_DEPTH
    return float(confirmed.mean()) if len(ratio) else 0.0, len(ratio)


def _depth_ratios(prediction: Prediction, index: int, T_map_cam: FloatArray,
                  camera: Camera | None, points: FloatArray) -> np.ndarray:
    """Depth of the landmarks in view of a camera as multiples of the predicted one there."""
    height, width = prediction.depth.shape[1:]
    camera = camera or Camera.from_matrix(prediction.K[index], (width, height))
    in_cam = transform_points(inverse(T_map_cam), points)
    pixels = np.rint(camera.project(in_cam))
    with np.errstate(invalid='ignore'):
        inside = (pixels >= 0).all(1) & (pixels < (width, height)).all(1) & (in_cam[:, 2] > 0)
    u, v = pixels[inside].astype(int).T
    depth = prediction.depth[index, v, u]
    return in_cam[inside, 2][depth > 0] / depth[depth > 0]


def depth_scale(prediction: Prediction, walk: Sequence[Frame], points: FloatArray) -> float | None:
    """Median ratio of the depth of landmarks [V, 3] in known cameras to what the network says."""
    ratios = [_depth_ratios(prediction, index, known_pose(frame), frame.camera, points)
              for index, frame in enumerate(walk)]
    found = np.concatenate(ratios)
    return float(np.median(found)) if len(found) else None


def rms_error(T: FloatArray, T_true: FloatArray) -> tuple[float, float]:
    """Rms distance (map units) and angle (radians) between poses [N, 4, 4]."""
    distance, degrees = pose_error(T, T_true)
    return (float(np.sqrt(np.mean(distance**2))),
            float(np.deg2rad(np.sqrt(np.mean(degrees**2)))))


def known_pose(frame: Frame) -> FloatArray:
    """The pose of a frame whose pose is known."""
    if frame.T_map_cam is None:
        raise ValueError(f'expected a frame with a pose, found {frame.source} without')
    return frame.T_map_cam
