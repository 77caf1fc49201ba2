"""Poses of a few calibrated views from matches of pairs and rough depths.

    motion of each pair by itself (`epipolar`), its unit from the depths of its first view
      -> maximum spanning trees: by the number of matches that agree, and by how clear a motion is
      -> all views together, from each tree: epipolar errors of all matches, and one length per
         pair; what explains the matches better stays

The pairs with the most matches are the nearest ones, whose motion may be any of two where all
that they see is flat; pairs with parallax are few and clear. Neither tree is always right.

Depths of a network are wrong together, over whole walls, and not at random: as errors of each
point they would pull poses off by degrees. So matches say rotations and directions, and depth only
how long a pair's baseline is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from feedforward_recon.geometry.epipolar import PairMotion, motion_between
from feedforward_recon.geometry.transforms import inverse, so3_exp

MIN_MATCHES = 12
MIN_AGREEING, MIN_SHARE = 30, 0.4  # of a pair that the views are refined with
BEST_SHARE = 0.5  # of the matches of a pair, surest first, that are used
TOLERANCE_PX = 1.0  # of a match that agrees with the motion of its pair, at a focal length of 220
ROBUST = 4.0  # square of the errors, in deviations, from which they count less (Cauchy)
CLEAR_DEG = 6.0  # between the rays of a pair's points: with more, a motion gets no clearer
LENGTH_DEVIATION = 0.1  # of the logarithm of the length of a baseline
STEPS, TRIALS = 12, 5
FLAT = 1e-9
DENSE = 64  # views whose equations are solved as one full matrix; of more, hardly any entry counts


@dataclass(frozen=True)
class ViewPair:
    """M matches of views i and j, in normalised coordinates.

    xy_i, xy_j: [M, 2]; deviation [M] of xy_j; depth_i [M] of the points in view i, rough.
    """

    i: int
    j: int
    xy_i: np.ndarray
    xy_j: np.ndarray
    deviation: np.ndarray
    depth_i: np.ndarray

    def surest(self, sure: float) -> ViewPair:
        """The better half of the matches, and all whose deviation is at most ``sure``."""
        limit = max(float(np.quantile(self.deviation, BEST_SHARE)), sure)
        return self.only(self.deviation <= limit)

    def only(self, kept: np.ndarray) -> ViewPair:
        """Some of the matches."""
        return ViewPair(self.i, self.j, self.xy_i[kept], self.xy_j[kept], self.deviation[kept],
                        self.depth_i[kept])


@dataclass(frozen=True)
class ViewEdge:
    """A pair whose motion T_i_j [4, 4] is known, in the unit of the depths, and who agrees.

    share: of the matches. angle: between the rays of most points, radians.
    """

    pair: ViewPair
    T_i_j: np.ndarray
    share: float
    angle: float

    @property
    def matches(self) -> int:
        """How many agree."""
        return len(self.pair.xy_i)

    @property
    def clarity(self) -> float:
        """How little doubt there is about the motion: most agree, and there is parallax."""
        return self.share * min(self.angle, np.radians(CLEAR_DEG))

    @property
    def length(self) -> float:
        """Of the baseline; 0 for a turn on the spot."""
        return float(np.linalg.norm(self.T_i_j[:3, 3]))


@dataclass(frozen=True)
class PlacedViews:
    """T_world_view [N, 4, 4] of the views that are ``placed`` [N]; the first is the world."""

    T_world_view: np.ndarray
    placed: np.ndarray


def placed_views(pairs: Sequence[ViewPair], count: int, focal_px: float, seed: int = 0,
                 mapped: Callable[..., Iterable] = map) -> PlacedViews:
    """Poses of so many views, of those that matches connect with the first one.

    focal_px: of the pixels in which matches were found, for tolerances. mapped: like ``map``,
    for what is worked out of each pair. Time and memory grow with the number of pairs.
    """
    tolerance = TOLERANCE_PX / focal_px
    motion = partial(_edge, tolerance=tolerance, seed=seed)
    edges = [edge for edge in mapped(motion, pairs) if edge is not None]
    trees = (_along_tree(edges, count, lambda edge: edge.matches),
             _along_tree(edges, count, lambda edge: edge.clarity))
    return min((_refined(views, edges, tolerance) for views in trees), key=lambda x: x[1])[0]


def _edge(pair: ViewPair, tolerance: float, seed: int) -> ViewEdge | None:
    if len(pair.xy_i) < MIN_MATCHES:
        return None
    sure = pair.surest(tolerance)
    motion = motion_between(sure.xy_i, sure.xy_j, tolerance, seed)
    if motion is None or motion.inliers.sum() < MIN_MATCHES // 2:
        return None
    T_i_j = motion.T_a_b.copy()
    T_i_j[:3, 3] *= _unit(motion, sure.depth_i)
    return ViewEdge(sure.only(motion.inliers), T_i_j, float(motion.inliers.mean()),
                    float(np.median(motion.angle[motion.inliers])))


def _unit(motion: PairMotion, depth: np.ndarray) -> float:
    """Length of the baseline of a motion with baseline 1, given depths of its points."""
    ratio = depth[motion.inliers] / motion.points[motion.inliers, 2]
    return float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else 1.0


def _along_tree(edges: Sequence[ViewEdge], count: int, worth: Callable[[ViewEdge], float]
                ) -> PlacedViews:
    """Views placed one by one, always by the edge that is worth most (Prim 1957)."""
    T = np.tile(np.eye(4), (count, 1, 1))
    placed = np.zeros(count, bool)
    at: list[list[int]] = [[] for _ in range(count)]
    for number, edge in enumerate(edges):
        at[edge.pair.i].append(number)
        at[edge.pair.j].append(number)
    waiting: list[tuple[float, int]] = []
    reached = 0
    while True:
        placed[reached] = True
        for number in at[reached]:
            heapq.heappush(waiting, (-worth(edges[number]), number))
        while waiting and placed[[edges[waiting[0][1]].pair.i, edges[waiting[0][1]].pair.j]].all():
            heapq.heappop(waiting)
        if not waiting:
            return PlacedViews(T, placed)
        best = edges[waiting[0][1]]
        i, j = best.pair.i, best.pair.j
        if placed[i]:
            T[j], reached = T[i] @ best.T_i_j, j
        else:
            T[i], reached = T[j] @ inverse(best.T_i_j), i


def _refined(views: PlacedViews, edges: Sequence[ViewEdge], tolerance: float
             ) -> tuple[PlacedViews, float]:
    """Views after Levenberg-Marquardt on all matches, and the cost; the first stays."""
    good = [edge for edge in edges if views.placed[edge.pair.i] and edge.share >= MIN_SHARE
            and edge.matches >= MIN_AGREEING and edge.length > 0]
    T, damping = views.T_world_view, 1e-3
    if not good:
        return views, 0.0
    for _ in range(STEPS):
        rows = [_Rows.of(edge, T, tolerance) for edge in good]
        A, b = _normal_equations(rows, len(T))
        cost = sum(row.cost for row in rows)
        for _ in range(TRIALS):
            moved = _moved(T, _solved(A, -b, damping))
            again = [_Rows.of(edge, moved, tolerance, row.norms)
                     for edge, row in zip(good, rows, strict=True)]
            if sum(row.cost for row in again) < cost:
                T, damping = moved, max(damping / 5, 1e-7)
                break
            damping *= 5
    cost = sum(_Rows.of(edge, T, tolerance).cost for edge in good)
    return PlacedViews(T, views.placed), cost


@dataclass(frozen=True)
class _Rows:
    """Errors of one pair in deviations, and their derivatives by [turn, move] of both views.

    errors [M], and that of the length last; jacobian [M + 1, 12]; norms [M] of the epipolar
    lines, with which the errors are distances (Sampson 1982).
    """

    views: tuple[int, int]
    errors: np.ndarray
    jacobian: np.ndarray
    norms: np.ndarray

    @property
    def cost(self) -> float:
        """Robust sum of squares."""
        return float((ROBUST * np.log1p(self.errors ** 2 / ROBUST)).sum())

    @staticmethod
    def of(edge: ViewEdge, T: np.ndarray, tolerance: float, norms: np.ndarray | None = None
           ) -> _Rows:
        """Errors at poses T [N, 4, 4]; norms: those of before, while a step is tried."""
        pair = edge.pair
        R_i, R_j = T[pair.i, :3, :3], T[pair.j, :3, :3]
        x, y = (np.column_stack([xy, np.ones(len(xy))]) for xy in (pair.xy_i, pair.xy_j))
        X, Y = x @ R_i.T, y @ R_j.T
        baseline = T[pair.i, :3, 3] - T[pair.j, :3, 3]
        length = max(float(np.linalg.norm(baseline)), FLAT)
        t = baseline / length
        tX, Yt = np.cross(t, X), np.cross(Y, t)
        if norms is None:
            norms = np.sqrt(((tX @ R_j)[:, :2] ** 2).sum(1) + ((Yt @ R_i)[:, :2] ** 2).sum(1))
        size = np.maximum(norms, FLAT) * np.maximum(pair.deviation, 0.3 * tolerance)
        XY = np.cross(X, Y)
        move = (XY - t * (XY @ t)[:, None]) / length
        rows = np.concatenate([np.cross(X, Yt), move, np.cross(Y, tX), -move], 1) / size[:, None]
        long = np.concatenate([np.zeros(3), t, np.zeros(3), -t]) / (length * LENGTH_DEVIATION)
        errors = np.append((Y * tX).sum(1) / size, np.log(length / edge.length) / LENGTH_DEVIATION)
        return _Rows((pair.i, pair.j), errors, np.vstack([rows, long]), norms)


def _normal_equations(rows: Sequence[_Rows], count: int) -> tuple[sparse.csc_array, np.ndarray]:
    """Robust normal equations [6 N, 6 N], [6 N]; the first view and those without rows stay."""
    index = np.array([[6 * view + np.arange(6) for view in row.views] for row in rows]
                     ).reshape(-1, 12)
    weighted = [row.jacobian.T / (1 + row.errors ** 2 / ROBUST) for row in rows]
    blocks = np.stack([w @ row.jacobian for w, row in zip(weighted, rows, strict=True)])
    b = np.zeros(6 * count)
    np.add.at(b, index, np.stack([w @ row.errors for w, row in zip(weighted, rows, strict=True)]))
    b[:6] = 0
    free = (index[:, :, None] >= 6) & (index[:, None] >= 6)
    at = (np.broadcast_to(index[:, :, None], free.shape)[free],
          np.broadcast_to(index[:, None], free.shape)[free])
    A = sparse.coo_array((blocks[free], at), (6 * count, 6 * count)).tocsc()
    return sparse.csc_array(A + sparse.diags((A.diagonal() == 0).astype(float))), b


def _solved(A: sparse.csc_array, b: np.ndarray, damping: float) -> np.ndarray:
    """X of (A + damping diag(A)) x = b."""
    damped = sparse.csc_array(A + damping * sparse.diags(A.diagonal()))
    if len(b) <= 6 * DENSE:
        return np.linalg.solve(damped.toarray(), b)
    return splu(damped, 'MMD_AT_PLUS_A', diag_pivot_thresh=0.0,
                options={'SymmetricMode': True}).solve(b)


def _moved(T: np.ndarray, step: np.ndarray) -> np.ndarray:
    turn, move = step.reshape(-1, 2, 3).swapaxes(0, 1)
    out = T.copy()
    out[:, :3, :3] = so3_exp(turn) @ T[:, :3, :3]
    out[:, :3, 3] += move
    return out
