"""Bundle adjustment of parts of the map: free and fixed keyframes, and outliers afterwards.

The solver is ``geometry.refine`` (Triggs et al. 2000).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.refine import BundleProblem, bundle_adjust
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.stereo_shift import from_this_pair, shift_inv_depth

# Times outlier_px: there, at 9 px, an observation has 3 % of its weight left (Cauchy, robust_px),
# so it is a mismatch rather than something yet to be pulled in; chosen by hand.
CULL_FACTOR = 3.0
# Observations whose landmarks are refined in one piece, while frames wait: the longest piece of a
# loop closure took 54 ms (docs/experiments.md, A loop closed in pieces).
POINTS_PIECE = 5000


def refine_window(map_: GrowingMap, config: MapperConfig, *, poses_fixed: bool = False) -> None:
    """Bundle adjustment of the newest keyframes; covisible older ones stay fixed.

    poses_fixed: only landmarks are refined, all poses stay.
    """
    window, count = config.refine.window, len(map_)
    free = np.arange(max(1, count - window), count)
    newest = np.unique(map_.landmarks.seen_landmark[
        map_.landmarks.seen_keyframe >= count - window])
    shared = map_.landmarks.shared(newest, count)
    shared[free] = 0
    fixed = np.argsort(-shared, kind='stable')[:config.refine.window_fixed]
    fixed = fixed[shared[fixed] > 0]
    if not poses_fixed and not len(fixed):
        fixed, free = free[:1], free[1:]
    if poses_fixed:
        free, fixed = free[:0], np.concatenate([free, fixed])
    _refine(map_, config, free, fixed, newest, config.refine.window_steps)


def adjust_newest(map_: GrowingMap, keyframes: int, settings: Sequence[MapperConfig]) -> None:
    """Refine the newest ``keyframes``, once with each of the settings.

    Older keyframes that share landmarks stay fixed.
    """
    for config in settings:
        refine = replace(config.refine, window=keyframes, window_steps=config.refine.global_steps)
        refine_window(map_, replace(config, refine=refine))


def refine_points(map_: GrowingMap, config: MapperConfig) -> Iterator[None]:
    """Refine all landmarks from all their views, poses held, in pieces of bounded cost.

    The map may grow between the pieces.
    """
    views = map_.landmarks.views() * map_.landmarks.has_point
    piece = np.cumsum(views) // POINTS_PIECE
    for number in np.unique(piece[views > 0]):
        ids = np.flatnonzero((piece == number) & (views > 0))
        _refine(map_, config, np.zeros(0, int), np.arange(len(map_)), ids,
                config.refine.loop_steps)
        yield


def refine_all(map_: GrowingMap, config: MapperConfig, *, refine_focal: bool = False,
               refine_shift: bool = False) -> float:
    """Bundle adjustment of the whole map (at most ``refine.max_keyframes`` are free).

    refine_focal: the focal length of all cameras is refined with it. refine_shift: so is the
    shift of the stereo pair of this session. Returns by how much its inverse depths were too
    large, 1/m.
    """
    count = len(map_)
    free = np.arange(max(1, count - config.refine.max_keyframes), count)
    fixed = np.arange(free[0]) if len(free) else np.zeros(0, int)
    ids = np.flatnonzero(map_.landmarks.has_point)
    return _refine(map_, config, free, fixed, ids, config.refine.global_steps, refine_focal,
                   refine_shift)


def _refine(map_: GrowingMap, config: MapperConfig, free: np.ndarray, fixed: np.ndarray,
            ids: np.ndarray, steps: int, refine_focal: bool = False, refine_shift: bool = False
            ) -> float:
    problem, rows, ids = bundle_problem(map_, config, free, fixed, ids, refine_focal)
    if problem is None:
        return 0.0
    if refine_shift:
        problem = replace(problem, shifted=from_this_pair(map_)[
            map_.landmarks.seen_keyframe[rows]])
    result = bundle_adjust(problem, steps)
    used = np.concatenate([free, fixed])
    map_.T_map_cam[used] = result.T_map_cam
    map_.landmarks.set_points_map(ids, result.points, map_.T_map_cam)
    if refine_focal:
        _rescale_focal(map_, result.focal_scale)
    if refine_shift:
        shift_inv_depth(map_, result.inv_depth_shift)
    # Beyond the tracking threshold: an observation that ties the window to an old place may
    # disagree until the loop is closed, and must not be lost before.
    _cull(map_, rows[result.residual > CULL_FACTOR * config.tracking.outlier_px], ids)
    return result.inv_depth_shift


def bundle_problem(map_: GrowingMap, config: MapperConfig, free: np.ndarray,
                   fixed: np.ndarray, ids: np.ndarray, refine_focal: bool = False
                   ) -> tuple[BundleProblem | None, np.ndarray, np.ndarray]:
    """Bundle adjustment of landmarks ``ids`` and keyframes, with its rows and landmarks.

    Poses in the order of ``free``, then ``fixed``. The problem is None where no landmark can be
    refined.
    """
    table, used = map_.landmarks, np.concatenate([free, fixed])
    ids = ids[table.has_point[ids]]
    local = np.full(len(map_), -1)
    local[used] = np.arange(len(used))
    rows = np.flatnonzero(table.mask(ids)[table.seen_landmark]
                          & (local[table.seen_keyframe] >= 0))
    # One view without depth says nothing about a point.
    weight = 1 + np.isfinite(table.seen_inv_depth[rows])
    firm = np.bincount(table.seen_landmark[rows], weight, len(table)) >= 2
    rows = rows[firm[table.seen_landmark[rows]]]
    if not len(rows):
        return None, rows, ids
    ids, point_index = np.unique(table.seen_landmark[rows], return_inverse=True)
    problem = BundleProblem(
        map_.T_map_cam[used], table.points_map(ids, map_.T_map_cam),
        np.arange(len(used)) >= len(free), local[table.seen_keyframe[rows]], point_index,
        table.seen_xy[rows], table.seen_inv_depth[rows], table.seen_sigma[rows],
        map_.keyframes[-1].camera.fx,
        _depth_noise(map_, table.seen_keyframe[rows], config.tracking.depth_noise),
        config.refine.robust_px, refine_focal)
    return problem, rows, ids


def _depth_noise(map_: GrowingMap, keyframes: np.ndarray, noise: float) -> np.ndarray:
    """Standard deviation of 1/z [O] in observations by keyframes [O]; noise: of depth images."""
    of_each = [noise if k.inv_depth_noise is None else k.inv_depth_noise for k in map_.keyframes]
    return np.array(of_each)[keyframes]


def _cull(map_: GrowingMap, bad_rows: np.ndarray, ids: np.ndarray) -> None:
    """Drop outlier observations, and positions of landmarks with too few others."""
    table = map_.landmarks
    table.forget(bad_rows)
    rows = np.flatnonzero(table.mask(ids)[table.seen_landmark])
    weight = 1 + np.isfinite(table.seen_inv_depth[rows])
    support = np.bincount(table.seen_landmark[rows], weight, len(table))[ids]
    table.alive[ids[support == 0]] = False
    table.point_cam[ids[support == 1]] = np.nan


def _rescale_focal(map_: GrowingMap, scale: float) -> None:
    for keyframe in map_.keyframes:
        keyframe.camera = scaled_focal(keyframe.camera, scale)
        keyframe.points_cam[:, :2] /= scale
        keyframe.cloud_cam[:, :2] /= scale
    map_.landmarks.seen_xy /= scale


def scaled_focal(camera: Camera, scale: float) -> Camera:
    """The camera with its focal lengths multiplied."""
    return Camera(camera.width, camera.height, camera.fx * scale, camera.fy * scale, camera.cx,
                  camera.cy, camera.distortion, camera.model)
