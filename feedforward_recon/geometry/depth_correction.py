"""Depth maps of placed views, bent to the points that matches of these views meet in.

Depths of a network are wrong together: a wall as a whole is too near, a floor too steep, while
edges and shapes are right. Matches of placed views say depth exactly, but at some pixels only. So
the logarithm of depth gets a smooth correction, which may jump where the depth itself does: of
least squares between the matches (robust) and the likeness of neighbouring corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, diags, vstack
from scipy.sparse.linalg import spsolve

from feedforward_recon.geometry.align import weighted_median
from feedforward_recon.geometry.epipolar import checked
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.geometry.view_graph import TOLERANCE_PX, PlacedViews, ViewPair

MIN_ANGLE_DEG = 1.0  # between the rays of a match that says depth
LEAST_DEVIATION_PX, LEAST_DEVIATION = 0.5, 0.02  # of a match; of the logarithm of its depth
STEP = 0.06  # deviation of the correction from cell to cell, where depth is level
JUMP = 0.05  # step of the logarithm of depth at which that deviation is doubled
SIZE = 2.0  # deviation of the correction about that of the whole view
# Of a view in a window: points that say its unit; the logarithm of a unit that cannot be its own.
MIN_POINTS, OTHER_UNIT = 50, 0.4
ROBUST, ROUNDS = 3.0, 3  # square of the errors from which matches count less (Cauchy)


@dataclass(frozen=True)
class SparseDepth:
    """Depth of M points of one view: places xy [M, 2] in it; log_depth [M] and its deviation.

    xy: normalised coordinates, or cells of a map with the middle of the first at 0.
    """

    xy: np.ndarray
    log_depth: np.ndarray
    deviation: np.ndarray


def sparse_depths(pairs: Sequence[ViewPair], views: PlacedViews, focal_px: float
                  ) -> list[SparseDepth]:
    """What matches that agree with the poses say of each view, at normalised coordinates.

    Nothing of views that are not placed. focal_px: of the pixels in which matches were found,
    for tolerances.
    """
    found: list[list[SparseDepth]] = [[] for _ in views.placed]
    for pair in pairs:
        if views.placed[pair.i] and views.placed[pair.j]:
            T_i_j = inverse(views.T_world_view[pair.i]) @ views.T_world_view[pair.j]
            in_i, in_j = _of_pair(pair, T_i_j, 1 / focal_px)
            found[pair.i].append(in_i)
            found[pair.j].append(in_j)
    return [_joined(parts) for parts in found]


def corrected_views(log_depth: Sequence[np.ndarray], seen: Sequence[SparseDepth],
                    mapped: Callable[..., Iterable] = map) -> list[np.ndarray]:
    """Log depth [h, w] of views whose unit is the same, each bent to points seen at its cells.

    A view with few points, or whose points want another unit than those of most views, stands
    where its pose is wrong: it gets the unit of the others and keeps its shape. mapped: like
    ``map``, over views.
    """
    units = np.array([_unit(view, points) for view, points in zip(log_depth, seen, strict=True)])
    if np.isnan(units).all():
        return list(log_depth)
    usual = np.nanmedian(units)

    def bent(view: np.ndarray, points: SparseDepth, unit: float) -> np.ndarray:
        return corrected(view, points) if abs(unit - usual) < OTHER_UNIT else view + usual

    return list(mapped(bent, log_depth, seen, units))


def _unit(log_depth: np.ndarray, seen: SparseDepth) -> float:
    """By how much points are farther than a view says, NaN for few; a logarithm."""
    if len(seen.xy) < MIN_POINTS:
        return np.nan
    return _missing(log_depth, seen)[0]


def corrected(log_depth: np.ndarray, seen: SparseDepth) -> np.ndarray:
    """Log depth [h, w] of one view bent to points that are seen at its cells."""
    if not len(seen.xy):
        return log_depth
    whole, missing, read = _missing(log_depth, seen)
    smooth = _likeness(log_depth)
    bent = np.zeros(log_depth.size)
    for _ in range(ROUNDS):
        errors = (missing - read @ bent) / seen.deviation
        weights = seen.deviation ** -2 / (1 + errors ** 2 / ROBUST)
        weighted = read.T @ diags(weights)
        bent = spsolve((smooth + weighted @ read).tocsc(), weighted @ missing)
    return log_depth + whole + bent.reshape(log_depth.shape)


def _missing(log_depth: np.ndarray, seen: SparseDepth) -> tuple[float, np.ndarray, csr_matrix]:
    """What a view lacks to its points: as a whole, each [M] beyond that; what reads it there."""
    read = _reading(seen.xy, log_depth.shape)
    missing = seen.log_depth - read @ log_depth.ravel()
    whole = weighted_median(missing, seen.deviation ** -2)
    return whole, missing - whole, read


def _of_pair(pair: ViewPair, T_i_j: np.ndarray, pixel: float) -> tuple[SparseDepth, SparseDepth]:
    motion = checked(T_i_j, pair.xy_i, pair.xy_j, TOLERANCE_PX * pixel)
    good = motion.inliers & (motion.angle > np.radians(MIN_ANGLE_DEG))
    points = motion.points[good]
    # Where rays meet moves by the error of a match over their angle.
    across = np.maximum(pair.deviation[good], LEAST_DEVIATION_PX * pixel)
    deviation = np.hypot(across / motion.angle[good], LEAST_DEVIATION)
    depth_j = ((points - T_i_j[:3, 3]) @ T_i_j[:3, :3])[:, 2]
    return (SparseDepth(pair.xy_i[good], np.log(points[:, 2]), deviation),
            SparseDepth(pair.xy_j[good], np.log(depth_j), deviation))


def _joined(parts: Sequence[SparseDepth]) -> SparseDepth:
    return SparseDepth(np.concatenate([part.xy for part in parts] or [np.zeros((0, 2))]),
                       np.concatenate([part.log_depth for part in parts] or [np.zeros(0)]),
                       np.concatenate([part.deviation for part in parts] or [np.zeros(0)]))


def _reading(at: np.ndarray, shape: tuple[int, ...]) -> csr_matrix:
    """The matrix [M, h * w] that reads a map bilinearly."""
    height, width = shape
    at = np.clip(at, 0, [width - 1, height - 1])
    corner = np.minimum(at.astype(int), [width - 2, height - 2])
    share = at - corner
    rows = np.arange(len(at))
    columns, values = [], []
    for dx, dy in np.ndindex(2, 2):
        columns.append((corner[:, 1] + dy) * width + corner[:, 0] + dx)
        values.append(np.abs(1 - dx - share[:, 0]) * np.abs(1 - dy - share[:, 1]))
    return csr_matrix((np.concatenate(values), (np.tile(rows, 4), np.concatenate(columns))),
                      (len(at), height * width))


def _likeness(log_depth: np.ndarray) -> csr_matrix:
    """Normal matrix [h * w, h * w] of corrections that are small and alike in neighbours."""
    cells = np.arange(log_depth.size).reshape(log_depth.shape)
    first = np.concatenate([cells[:, :-1].ravel(), cells[:-1].ravel()])
    second = np.concatenate([cells[:, 1:].ravel(), cells[1:].ravel()])
    flat = log_depth.ravel()
    weight = 1 / (STEP * (1 + np.abs(flat[first] - flat[second]) / JUMP))
    rows = np.arange(len(first))
    steps = csr_matrix((np.concatenate([weight, -weight]),
                        (np.tile(rows, 2), np.concatenate([first, second]))),
                       (len(first), flat.size))
    everything = vstack([steps, diags(np.full(flat.size, 1 / SIZE))])
    return (everything.T @ everything).tocsr()
