"""Geometry between predictions of one place: overlap, alignment, scale.

All of it rests on a coarse grid of pixels, the same in every image: a few hundred points per
image with the network's confidence as their weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from feedforward_recon.geometry.align import (
    Alignment,
    align_orientations,
    align_points_robust,
)
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    pose_error,
    transform_points,
)
from feedforward_recon.types import FloatArray, Prediction

GRID = 20  # samples along the longer side of an image: 300 points of a 4:3 image
# Share by which two predicted depths of one point may differ: networks are off by some per cent,
# other surfaces by more; chosen by hand.
SAME_DEPTH = 0.1
# Share of an image that another one must show as well for the two to overlap: 45 of 300
# points; chosen by hand.
MIN_SHARED = 0.15
MIN_CONFIRMED = 0.5  # of the points that fall into the other image: most must be at its depth


@dataclass(frozen=True)
class Samples:
    """A grid of M pixels in each of N images.

    px: int [M, 2] as (u, v). points_cam, points_world: [N, M, 3]. weight: [N, M], the
    confidence, 0 where there is no depth.
    """

    px: np.ndarray
    points_cam: np.ndarray
    points_world: np.ndarray
    weight: np.ndarray

    @property
    def depth(self) -> np.ndarray:
        """z-depth [N, M], 0 where unknown."""
        return self.points_cam[..., 2]

    @property
    def typical_depth(self) -> float:
        """Median z-depth of all samples (1 if there are none)."""
        known = self.weight > 0
        return float(np.median(self.depth[known])) if known.any() else 1.0


def samples(prediction: Prediction) -> Samples:
    """Points of a grid of pixels of every image."""
    height, width = prediction.depth.shape[1:]
    step = max(1, round(max(height, width) / GRID))
    v, u = np.mgrid[step // 2:height:step, step // 2:width:step].reshape(2, -1)
    depth = prediction.depth[:, v, u].astype(float)
    known = np.isfinite(depth) & (depth > 0)
    depth = np.where(known, depth, 0.0)
    pixels = np.stack([u, v, np.ones_like(u)], 1).astype(float)
    rays = pixels @ np.swapaxes(np.linalg.inv(prediction.K), -1, -2)  # [N, M, 3]
    points = rays * depth[..., None]
    weight = np.where(known, prediction.confidence[:, v, u], 0.0)
    return Samples(pixels[:, :2].astype(int), points,
                   transform_points(prediction.T_world_cam, points), weight)


def selected(prediction: Prediction, index: np.ndarray | slice) -> Prediction:
    """The part of a prediction that belongs to some of its images."""
    return Prediction(prediction.T_world_cam[index], prediction.K[index],
                      prediction.depth[index], prediction.confidence[index])


def moved(prediction: Prediction, fit: Alignment) -> Prediction:
    """The prediction in the target frame and unit of ``fit``."""
    return replace(prediction, T_world_cam=fit.apply_to_poses(prediction.T_world_cam),
                   depth=prediction.depth * np.float32(fit.scale))


def scaling(scale: float) -> Alignment:
    """The alignment that changes nothing but the unit."""
    return Alignment(np.eye(4), scale, np.ones(0), np.zeros(0))


def alignments(source: Prediction, T_map_cam: np.ndarray, target: Samples, *,
               with_scale: bool) -> Iterator[Alignment]:
    """Transforms that bring ``source`` onto samples of the same images in the map, best first.

    By the cameras and the ratio of depths: a network turns its cameras right to parts of a
    degree where errors of its depth, which go together over walls, would tilt a window. Then by
    the points alone, for a window whose cameras contradict the map: weighted Procrustes (Umeyama
    1991), robust to outliers.
    T_map_cam [N, 4, 4]: where the cameras of the samples are now.
    Raises DegenerateError when the points do not determine it.
    """
    found = samples(source)
    weight = np.sqrt(found.weight * target.weight).ravel()
    both = weight > 0
    points = transform_points(T_map_cam, target.points_cam).reshape(-1, 3)[both]
    there = found.points_world.reshape(-1, 3)[both]
    by_points = align_points_robust(there, points, weight[both], with_scale=with_scale)
    scale = float(np.median(target.depth.ravel()[both] / found.depth.ravel()[both])) \
        if with_scale else 1.0
    T = _between_cameras(source.T_world_cam, T_map_cam, scale)
    by_cameras = replace(by_points, T_target_source=T, scale=scale)
    yield replace(by_cameras, residuals=np.linalg.norm(by_cameras.apply(there) - points, axis=1))
    yield by_points


def _between_cameras(T_source_cam: np.ndarray, T_map_cam: np.ndarray, scale: float) -> np.ndarray:
    """T_map_source [4, 4]: mean turn and shift between poses [N, 4, 4] of the same cameras."""
    R = align_orientations(T_source_cam[:, :3, :3], T_map_cam[:, :3, :3])
    return make_transform(R, (T_map_cam[:, :3, 3] - scale * T_source_cam[:, :3, 3] @ R.T).mean(0))


def residual(fit: Alignment, target: Samples) -> float:
    """Median distance after an alignment, as a share of the median depth of its target."""
    return float(np.median(fit.residuals) / target.typical_depth)


def typical_depth(prediction: Prediction) -> float:
    """Median z-depth of all samples (1 if there are none)."""
    return samples(prediction).typical_depth


def pose_spread(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """How far poses [N, 4, 4] of the same cameras lie apart: rms distance and angle (rad)."""
    metres, degrees = pose_error(a, b)
    return float(np.sqrt(np.mean(metres**2))), float(np.deg2rad(np.sqrt(np.mean(degrees**2))))


@dataclass(frozen=True)
class Agreement:
    """How well N images of one prediction explain each other.

    shared: [N, N] share of the points of image i that image j shows at the same depth.
    confirmed: [N, N] the same as a share of those that fall into image j.
    error: [N] median relative difference of the depths that agree, 0 without any.
    """

    shared: np.ndarray
    confirmed: np.ndarray
    error: np.ndarray

    @property
    def groups(self) -> np.ndarray:
        """Label [N] of the connected component of overlapping images of each image."""
        overlap = (self.shared >= MIN_SHARED) & (self.confirmed >= MIN_CONFIRMED)
        graph = sparse.csr_matrix(overlap | overlap.T)
        return sparse.csgraph.connected_components(graph, directed=False)[1]

    def members(self, anchors: int) -> np.ndarray:
        """Mask [N] of the group with the most new images beside one of the first ``anchors``.

        Without anchors: the group with the most images; of one image only if it is alone.
        """
        group = self.groups
        if not anchors:
            sizes = np.bincount(group)
            return (group == sizes.argmax()) & (sizes.max() > min(1, len(group) - 1))
        labels = np.unique(group[:anchors])
        sizes = np.array([(group[anchors:] == label).sum() for label in labels])
        return group == labels[sizes.argmax()]

    @property
    def score(self) -> np.ndarray:
        """Share [N] of an image's points that the image that overlaps it most confirms."""
        if len(self.shared) == 1:
            return np.ones(1)
        others = self.shared.copy()
        np.fill_diagonal(others, -1)
        return self.confirmed[np.arange(len(others)), others.argmax(1)]


def agreement(prediction: Prediction) -> Agreement:
    """Project the points of every image into every other and compare the depths there."""
    grid, count = samples(prediction), len(prediction)
    shared, confirmed, error = np.zeros((count, count)), np.zeros((count, count)), np.zeros(count)
    T_cam_world = inverse(prediction.T_world_cam)
    for i in range(count):
        points = grid.points_world[i, grid.weight[i] > 0]
        if not len(points):
            continue
        in_cams = transform_points(T_cam_world, points[None])  # [N, M, 3]
        inside, difference = _differences(prediction, in_cams)
        same = inside & (difference < SAME_DEPTH)
        shared[i] = same.sum(1) / len(points)
        confirmed[i] = same.sum(1) / np.maximum(inside.sum(1), 1)
        same[i] = False
        error[i] = np.median(difference[same]) if same.any() else 0.0
    return Agreement(shared, confirmed, error)


def _differences(prediction: Prediction, in_cams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where points [N, M, 3], given in each camera, fall into its image, and |z / depth - 1|."""
    height, width = prediction.depth.shape[1:]
    z = in_cams[..., 2]
    front = z > 0
    rays = in_cams / np.where(front, z, np.inf)[..., None]
    px = np.rint((rays @ np.swapaxes(prediction.K, -1, -2))[..., :2])
    inside = front & (px >= 0).all(-1) & (px < (width, height)).all(-1)
    u, v = np.where(inside[..., None], px, 0).astype(int).transpose(2, 0, 1)
    depth = prediction.depth[np.arange(len(prediction))[:, None], v, u]
    inside &= depth > 0
    return inside, np.abs(z / np.where(inside, depth, np.inf) - 1)


def depth_ratio(prediction: Prediction, sensor: Sequence[FloatArray | None]) -> float | None:
    """Metres per unit of a prediction, from sensor depth [H, W] of its images where known."""
    ratios: list[np.ndarray] = []
    grid = samples(prediction)
    u, v = grid.px.T
    for index, image in enumerate(sensor):
        if image is not None:
            measured = np.nan_to_num(image[v, u])
            good = (measured > 0) & (grid.weight[index] > 0)
            ratios.append(measured[good] / grid.depth[index, good])
    found = np.concatenate(ratios) if ratios else np.zeros(0)
    return float(np.median(found)) if len(found) else None
