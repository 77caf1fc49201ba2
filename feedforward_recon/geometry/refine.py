"""Bundle adjustment in NumPy: keyframe poses, points and, if asked, one value of the cameras.

Levenberg-Marquardt on reprojection errors and sensor inverse-depth errors with Cauchy weights
(iteratively re-weighted), the points eliminated by the Schur complement (Triggs et al.,
"Bundle Adjustment - A Modern Synthesis", 2000, section 6). Residual of observation o of point
X by keyframe k, with p = T_cam_map X, in standard deviations:

    r = [ f (s p_x / p_z - x_o) / sigma,
          f (s p_y / p_z - y_o) / sigma,
          (1 / p_z - d_o + e) / sigma_d ]

One of two values of the cameras may be refined too: ``s`` scales the focal length, ``e`` shifts
the inverse depths of a stereo pair, as a small turn of one camera about its vertical axis does.
Points are eliminated in blocks of neighbours: each block
touches few keyframes, so its Schur complement is one small dense matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve

from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry.pnp import pose_jacobian
from feedforward_recon.geometry.transforms import inverse, se3_exp

# Points per block. Blocks this small also keep each product below the size from which BLAS
# starts threads, which cost more than they save when other processes share the cores.
BLOCK = 40
MIN_DEPTH = 1e-6
FOCAL_PRIOR_STD = 0.3
SHIFT_PRIOR_STD = 3.0  # standard deviations of one inverse depth: a pixel, where that is 0.3


@dataclass(frozen=True)
class BundleProblem:
    """What is known and what is seen.

    T_map_cam: [P, 4, 4]; points: map frame [L, 3]; fixed: bool [P], poses that stay.
    pose_index, point_index: int [O], each pair at most once.
    xy: [O, 2] undistorted normalised coordinates; inv_depth: [O] sensor 1/z, NaN if none.
    sigma_px: [O] expected pixel error; depth_noise: standard deviation of ``inv_depth``, one for
    all or [O].
    focal_px: converts normalised coordinates to pixels. points_fixed: points stay as well.
    shifted: bool [O], inverse depths that share a shift to be refined; None: there is none.
    """

    T_map_cam: np.ndarray
    points: np.ndarray
    fixed: np.ndarray
    pose_index: np.ndarray
    point_index: np.ndarray
    xy: np.ndarray
    inv_depth: np.ndarray
    sigma_px: np.ndarray
    focal_px: float
    depth_noise: float | np.ndarray = 0.004
    robust_px: float = 1.5
    refine_focal: bool = False
    shifted: np.ndarray | None = None


@dataclass(frozen=True)
class BundleResult:
    """Refined values; residual [O] in sigmas (inf behind the camera), costs before and after.

    inv_depth_shift: by how much the ``shifted`` inverse depths are too large.
    """

    T_map_cam: np.ndarray
    points: np.ndarray
    focal_scale: float
    residual: np.ndarray
    cost_before: float
    cost_after: float
    inv_depth_shift: float = 0.0


@dataclass(frozen=True)
class _State:
    T_cam_map: np.ndarray
    points: np.ndarray
    focal_scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class _System:
    """Normal equations: blocks of cameras U [P, 6, 6], points V [L, 3, 3], mixed W [O, 6, 3]."""

    U: np.ndarray
    V: np.ndarray
    W: np.ndarray
    g_pose: np.ndarray
    g_point: np.ndarray
    # Focal length or shift: mixed with poses [P, 6] and points [L, 3], own block and gradient.
    focal: tuple[np.ndarray, np.ndarray, float, float] | None


class _Layout:
    """Index tables that stay the same over all iterations."""

    def __init__(self, problem: BundleProblem) -> None:
        count, obs = len(problem.points), np.arange(len(problem.pose_index))
        ones = np.ones(len(obs))
        self.n_poses = len(problem.fixed)
        self.by_pose = sparse.csr_matrix((ones, (problem.pose_index, obs)),
                                         (self.n_poses, len(obs)))
        self.by_point = sparse.csr_matrix((ones, (problem.point_index, obs)),
                                          (count, len(obs)))
        free = np.flatnonzero(~problem.fixed)
        self.free, self.column = free, np.full(self.n_poses, -1)
        self.column[free] = np.arange(len(free))
        # Neighbouring points are first seen by the same keyframe.
        first = np.full(count, self.n_poses)
        np.minimum.at(first, problem.point_index, problem.pose_index)
        rank = np.empty(count, int)
        rank[np.argsort(first, kind='stable')] = np.arange(count)
        self.blocks = self._split(problem, rank)

    def _split(self, problem: BundleProblem,
               rank: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """Per block: observations, their local pose, their local point, poses, points."""
        usable = np.flatnonzero(self.column[problem.pose_index] >= 0)
        block = rank[problem.point_index[usable]] // BLOCK
        order = np.argsort(block, kind='stable')
        usable, block = usable[order], block[order]
        out: list[tuple[np.ndarray, ...]] = []
        for part in np.split(usable, np.flatnonzero(np.diff(block)) + 1):
            if len(part):
                poses, local_pose = np.unique(self.column[problem.pose_index[part]],
                                              return_inverse=True)
                points, local_point = np.unique(problem.point_index[part], return_inverse=True)
                out.append((part, local_pose, local_point, poses, points))
        return out


def residuals(problem: BundleProblem, state: _State, *, jacobians: bool = True
              ) -> tuple[np.ndarray, ...]:
    """Residuals [O, 3], validity [O] and, if asked, J_pose [O,3,6], J_point [O,3,3], J_f [O,3].

    The last is by the focal scale, or by the shift of inverse depths where one is refined.

    Poses are perturbed as T_cam_map <- exp(xi) T_cam_map.
    """
    T = state.T_cam_map[problem.pose_index]
    R = T[:, :3, :3]
    p = np.matmul(R, state.points[problem.point_index][..., None])[..., 0] + T[:, :3, 3]
    front = p[:, 2] > MIN_DEPTH
    p = np.where(front[:, None], p, (0.0, 0.0, 1.0))
    inv_z = 1 / p[:, 2]
    xy = p[:, :2] * inv_z[:, None]
    gain = problem.focal_px / problem.sigma_px
    has_depth = np.isfinite(problem.inv_depth)
    r = np.zeros((len(p), 3))
    r[:, :2] = gain[:, None] * (state.focal_scale * xy - problem.xy)
    r[:, 2] = np.where(has_depth, inv_z - np.nan_to_num(problem.inv_depth), 0)
    if problem.shifted is not None:
        r[:, 2] += np.where(has_depth & problem.shifted, state.shift, 0)
    r[:, 2] /= problem.depth_noise
    if not jacobians:
        return r, front
    D = np.zeros((len(p), 3, 3))
    slope = gain * state.focal_scale * inv_z
    D[:, 0, 0] = D[:, 1, 1] = slope
    D[:, 0, 2], D[:, 1, 2] = -slope * xy[:, 0], -slope * xy[:, 1]
    D[:, 2, 2] = np.where(has_depth, -inv_z**2 / problem.depth_noise, 0)
    if problem.shifted is not None:
        J_focal = np.zeros((len(p), 3))
        J_focal[:, 2] = (has_depth & problem.shifted) / problem.depth_noise
    else:
        J_focal = np.concatenate([gain[:, None] * xy, np.zeros((len(p), 1))], 1)
    return r, front, D @ pose_jacobian(p), D @ R, J_focal


def robust_cost(problem: BundleProblem, r: np.ndarray,
                front: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Cauchy cost, weights [O, 3] of the rows, and image errors [O] in sigmas."""
    scale2 = problem.robust_px**2
    norm2 = np.where(front, (r[:, :2]**2).sum(1), 1e8)
    squares = np.stack([norm2, np.where(front, r[:, 2]**2, 0)], 1) / scale2
    cost = 0.5 * scale2 * float(np.log1p(squares).sum())
    weight = np.where(front[:, None], 1 / (1 + squares), 0)
    return cost, weight[:, [0, 0, 1]], np.where(front, np.sqrt(norm2), np.inf)


def bundle_adjust(problem: BundleProblem, steps: int) -> BundleResult:
    """Refine a problem with at most ``steps`` accepted or refused LM steps.

    The robust cost never increases; fixed poses are returned bit for bit.
    Raises DegenerateError when nothing holds the map in place (no fixed pose).
    """
    return [part for part in bundle_pieces(problem, steps) if part is not None][-1]


def bundle_pieces(problem: BundleProblem, steps: int) -> Iterator[BundleResult | None]:
    """``bundle_adjust`` in pieces, for callers with other things to do: None, .., the result."""
    if not problem.fixed.any():
        raise DegenerateError('expected at least one fixed keyframe, found none; fix the first '
                              'keyframe so that the map frame is determined')
    state = _State(inverse(problem.T_map_cam), problem.points.copy())
    if not len(problem.pose_index):
        yield BundleResult(problem.T_map_cam, problem.points, 1.0, np.zeros(0), 0.0, 0.0)
        return
    layout = _Layout(problem)
    before = cost = _cost(problem, state)
    yield None
    damping, system = 1e-4, _linearise(problem, layout, state)
    for _ in range(steps):
        yield None
        trial = _step(problem, layout, state, system, damping)
        yield None
        # Where nothing fixes the scale, rounding can leave the system indefinite.
        new = np.inf if trial is None else _cost(problem, trial)
        if trial is None or new > cost:
            damping *= 10
            continue
        small = cost - new < 1e-4 * cost
        state, cost, damping = trial, new, max(damping / 5, 1e-9)
        if small:
            break
        system = _linearise(problem, layout, state)
    poses = problem.T_map_cam.copy()
    poses[layout.free] = inverse(state.T_cam_map[layout.free])
    error = robust_cost(problem, *residuals(problem, state, jacobians=False))[2]
    yield BundleResult(poses, state.points, state.focal_scale, error, before, cost, state.shift)


def _cost(problem: BundleProblem, state: _State) -> float:
    value, std = _prior(problem, state)
    prior = (value / std)**2 / 2
    return robust_cost(problem, *residuals(problem, state, jacobians=False))[0] + prior


def _prior(problem: BundleProblem, state: _State) -> tuple[float, float]:
    """What is known beforehand of the refined value of the cameras: its size, and how sure."""
    if problem.shifted is not None:
        return state.shift, SHIFT_PRIOR_STD * float(np.median(problem.depth_noise))
    return float(np.log(state.focal_scale)), FOCAL_PRIOR_STD


def _linearise(problem: BundleProblem, layout: _Layout, state: _State) -> _System:
    r, front, J_pose, J_point, J_focal = residuals(problem, state)
    _, weight, _ = robust_cost(problem, r, front)
    A = np.swapaxes(J_pose * weight[..., None], 1, 2)  # [O, 6, 3]
    B = np.swapaxes(J_point * weight[..., None], 1, 2)  # [O, 3, 3]
    column = r[..., None]

    def total(table: sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
        out = table @ values.reshape(len(values), -1)
        return out.reshape(table.shape[0], *values.shape[1:])

    focal = None
    if problem.refine_focal or problem.shifted is not None:
        value, std = _prior(problem, state)
        h_focal = float((weight * J_focal**2).sum()) + std**-2
        g_focal = float((weight * J_focal * r).sum()) + value / std**2
        focal = (total(layout.by_pose, (A @ J_focal[..., None])[..., 0]),
                 total(layout.by_point, (B @ J_focal[..., None])[..., 0]), h_focal, g_focal)
    return _System(total(layout.by_pose, A @ J_pose), total(layout.by_point, B @ J_point),
                   A @ J_point, total(layout.by_pose, (A @ column)[..., 0]),
                   total(layout.by_point, (B @ column)[..., 0]),
                   focal)


def _damped(blocks: np.ndarray, damping: float) -> np.ndarray:
    out = blocks.copy()
    i = np.arange(blocks.shape[-1])
    out[..., i, i] += damping * out[..., i, i] + 1e-9
    return out


def _step(problem: BundleProblem, layout: _Layout, state: _State, system: _System,
          damping: float) -> _State | None:
    """The state after one damped Gauss-Newton step (Schur complement on the points).

    None when the damping is too weak for a factorisation.
    """
    V_inv = np.linalg.inv(_damped(system.V, damping))
    S, b = _reduced(problem, layout, system, V_inv, damping)
    step = b  # empty when every pose is held, which SciPy 1.11 cannot factor
    if len(b):
        try:
            step = -cho_solve(cho_factor(S, check_finite=False), b, check_finite=False)
        except np.linalg.LinAlgError:
            return None
    n = len(layout.free)
    xi = np.zeros((layout.n_poses, 6))
    xi[layout.free] = step[:6 * n].reshape(n, 6)
    focal_step = 0.0 if system.focal is None else float(step[-1])
    # Back-substitution: V dx = -(g + W^T xi + f ds).
    pull = np.matmul(np.swapaxes(system.W, 1, 2), xi[problem.pose_index][..., None])[..., 0]
    rhs = system.g_point + layout.by_point @ pull
    if system.focal is not None:
        rhs += system.focal[1] * focal_step
    points = state.points - np.matmul(V_inv, rhs[..., None])[..., 0]
    moved = replace(state, T_cam_map=se3_exp(xi) @ state.T_cam_map, points=points)
    if problem.shifted is not None:
        return replace(moved, shift=state.shift + focal_step)
    return replace(moved, focal_scale=state.focal_scale * np.exp(focal_step / state.focal_scale))


def _reduced(problem: BundleProblem, layout: _Layout, system: _System, V_inv: np.ndarray,
             damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Reduced camera system S, b: free poses, then the focal length if it is refined."""
    n, extra = len(layout.free), int(system.focal is not None)
    S = np.zeros((6 * n + extra, 6 * n + extra))
    b = np.zeros(6 * n + extra)
    poses = S[:6 * n, :6 * n].reshape(n, 6, n, 6)
    i = np.arange(n)
    poses[i, :, i, :] = _damped(system.U[layout.free], damping)
    Y = np.matmul(system.W, V_inv[problem.point_index])  # [O, 6, 3]
    eliminated = np.matmul(Y, system.g_point[problem.point_index][..., None])[..., 0]
    b[:6 * n] = (system.g_pose - layout.by_pose @ eliminated)[layout.free].ravel()
    for part, pose, point, pose_set, point_set in layout.blocks:
        shape = (len(pose_set), 6, len(point_set), 3)
        left, right = np.zeros(shape), np.zeros(shape)
        left[pose, :, point], right[pose, :, point] = Y[part], system.W[part]
        rows = left.reshape(shape[0], 6, 3 * shape[2])
        product = rows @ right.reshape(6 * shape[0], 3 * shape[2]).T  # [p, 6, 6 p]
        poses[pose_set[:, None], :, pose_set[None], :] -= product.reshape(
            shape[0], 6, shape[0], 6).transpose(0, 2, 1, 3)
    if system.focal is not None:
        f_pose, f_point, h, g = system.focal
        mixed = np.matmul(Y, f_point[problem.point_index][..., None])[..., 0]
        S[:-1, -1] = S[-1, :-1] = (f_pose - layout.by_pose @ mixed)[layout.free].ravel()
        weighted = np.matmul(V_inv, f_point[..., None])[..., 0]
        S[-1, -1] = h * (1 + damping) - float((weighted * f_point).sum())
        b[-1] = g - float((weighted * system.g_point).sum())
    return S, b
