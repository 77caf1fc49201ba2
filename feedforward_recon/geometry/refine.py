"""Bundle adjustment in NumPy: keyframe poses, points and, if asked, the calibration.

Levenberg-Marquardt on reprojection errors and sensor inverse-depth errors with Cauchy weights
(iteratively re-weighted), the points eliminated by the Schur complement (Triggs et al.,
"Bundle Adjustment - A Modern Synthesis", 2000, section 6). Residual of observation o of point
X by keyframe k, with p = T_cam_map X, in standard deviations:

    r = [ f (s (1 + k q) p_x / p_z - x_o) / sigma,    q = (p_x^2 + p_y^2) / p_z^2
          f (s (1 + k q) p_y / p_z - y_o) / sigma,
          (1 / p_z - d_o + e) / sigma_d ]

The calibration: ``s`` scales the focal length, ``k`` is radial distortion beyond what is known
(the k1 of Brown 1971), ``e`` shifts the inverse depths of a stereo pair, as a small turn of one
camera about its vertical axis does. Points are eliminated in blocks of neighbours: each block
touches few keyframes, so its Schur complement is one small dense matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

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
# What may be refined of the calibration, and how far it is expected to be off: the logarithm of a
# guessed focal length by a third, k of a lens that was called undistorted by a few hundredths, the
# shift of a pair by three standard deviations of one inverse depth: a pixel, where that is 0.3.
PRIOR_STD = {'focal': 0.3, 'radial': 0.05, 'shift': 3.0}


@dataclass(frozen=True)
class BundleProblem:
    """What is known and what is seen.

    T_map_cam: [P, 4, 4]; points: map frame [L, 3]; fixed: bool [P], poses that stay.
    pose_index, point_index: int [O], each pair at most once.
    xy: [O, 2] undistorted normalised coordinates; inv_depth: [O] sensor 1/z, NaN if none.
    sigma_px: [O] expected pixel error; depth_noise: standard deviation of ``inv_depth``, one for
    all or [O].
    focal_px: converts normalised coordinates to pixels. calibration: what of it is refined, of the
    names of ``PRIOR_STD``. shifted: bool [O], inverse depths that share the shift.
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
    calibration: tuple[str, ...] = ()
    shifted: np.ndarray | bool = False


@dataclass(frozen=True)
class BundleResult:
    """Refined values; residual [O] in sigmas (inf behind the camera), costs before and after.

    focal_scale: times the focal length of before; radial: k beyond what was known;
    inv_depth_shift: by how much the ``shifted`` inverse depths are too large.
    """

    T_map_cam: np.ndarray
    points: np.ndarray
    focal_scale: float
    radial: float
    inv_depth_shift: float
    residual: np.ndarray
    cost_before: float
    cost_after: float


@dataclass(frozen=True)
class _State:
    T_cam_map: np.ndarray
    points: np.ndarray
    focal_scale: float = 1.0
    radial: float = 0.0
    shift: float = 0.0


@dataclass(frozen=True)
class _System:
    """Normal equations: blocks of cameras U [P, 6, 6], points V [L, 3, 3], mixed W [O, 6, 3]."""

    U: np.ndarray
    V: np.ndarray
    W: np.ndarray
    g_pose: np.ndarray
    g_point: np.ndarray
    # The calibration, m values: mixed with poses [P, 6, m] and points [L, 3, m], its own block
    # [m, m] and gradient [m].
    calibration: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


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
    """Residuals [O, 3], validity [O] and, if asked, their Jacobians.

    These are by the pose [O, 3, 6], the point [O, 3, 3] and the calibration [O, 3, m]. Poses are
    perturbed as T_cam_map <- exp(xi) T_cam_map.
    """
    T = state.T_cam_map[problem.pose_index]
    R = T[:, :3, :3]
    p = np.matmul(R, state.points[problem.point_index][..., None])[..., 0] + T[:, :3, 3]
    front = p[:, 2] > MIN_DEPTH
    p = np.where(front[:, None], p, (0.0, 0.0, 1.0))
    inv_z = 1 / p[:, 2]
    xy = p[:, :2] * inv_z[:, None]
    gain = problem.focal_px / problem.sigma_px
    q = (xy**2).sum(1)
    stretch = state.focal_scale * (1 + state.radial * q)
    has_depth = np.isfinite(problem.inv_depth)
    r = np.zeros((len(p), 3))
    r[:, :2] = gain[:, None] * (stretch[:, None] * xy - problem.xy)
    r[:, 2] = np.where(has_depth, inv_z - np.nan_to_num(problem.inv_depth)
                       + state.shift * problem.shifted, 0)
    r[:, 2] /= problem.depth_noise
    if not jacobians:
        return r, front
    D = np.zeros((len(p), 3, 3))
    D[:, 0, 0] = D[:, 1, 1] = gain * stretch * inv_z
    if state.radial:
        D[:, :2, :2] += ((2 * state.focal_scale * state.radial * gain * inv_z)[:, None, None]
                         * xy[:, :, None] * xy[:, None])
    D[:, :2, 2] = -(D[:, :2, :2] @ xy[..., None])[..., 0]
    D[:, 2, 2] = np.where(has_depth, -inv_z**2 / problem.depth_noise, 0)
    J_calibration = np.zeros((len(p), 3, len(problem.calibration)))
    stretched = {'focal': 1 + state.radial * q, 'radial': state.focal_scale * q}
    for column, name in enumerate(problem.calibration):
        if name == 'shift':
            J_calibration[:, 2, column] = (has_depth & problem.shifted) / problem.depth_noise
        else:
            J_calibration[:, :2, column] = (gain * stretched[name])[:, None] * xy
    return r, front, D @ pose_jacobian(p), D @ R, J_calibration


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
        yield BundleResult(problem.T_map_cam, problem.points, 1.0, 0.0, 0.0, np.zeros(0), 0.0,
                           0.0)
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
    yield BundleResult(poses, state.points, state.focal_scale, state.radial, state.shift,
                       error, before, cost)


def _cost(problem: BundleProblem, state: _State) -> float:
    off, information = _prior(problem, state)
    return (robust_cost(problem, *residuals(problem, state, jacobians=False))[0]
            + float(off @ information @ off) / 2)


def _prior(problem: BundleProblem, state: _State) -> tuple[np.ndarray, np.ndarray]:
    """What the calibration is off from before [m], and the information [m, m] of that."""
    off = {'focal': float(np.log(state.focal_scale)), 'radial': state.radial,
           'shift': state.shift}
    unit = {'shift': float(np.median(problem.depth_noise))}
    std = np.array([PRIOR_STD[name] * unit.get(name, 1.0) for name in problem.calibration])
    return np.array([off[name] for name in problem.calibration]), np.diag(std**-2)


def _linearise(problem: BundleProblem, layout: _Layout, state: _State) -> _System:
    r, front, J_pose, J_point, J_calibration = residuals(problem, state)
    _, weight, _ = robust_cost(problem, r, front)
    A = np.swapaxes(J_pose * weight[..., None], 1, 2)  # [O, 6, 3]
    B = np.swapaxes(J_point * weight[..., None], 1, 2)  # [O, 3, 3]
    column = r[..., None]

    def total(table: sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
        out = table @ values.reshape(len(values), math.prod(values.shape[1:]))
        return out.reshape(table.shape[0], *values.shape[1:])

    off, information = _prior(problem, state)
    flat = J_calibration.reshape(r.size, len(off))
    C = (flat * weight.reshape(-1, 1)).T  # [m, 3 O]
    calibration = (total(layout.by_pose, A @ J_calibration),
                   total(layout.by_point, B @ J_calibration),
                   C @ flat + information, C @ r.ravel() + information @ off)
    return _System(total(layout.by_pose, A @ J_pose), total(layout.by_point, B @ J_point),
                   A @ J_point, total(layout.by_pose, (A @ column)[..., 0]),
                   total(layout.by_point, (B @ column)[..., 0]), calibration)


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
    change = step[6 * n:]
    # Back-substitution: V dx = -(g + W^T xi + F ds).
    pull = np.matmul(np.swapaxes(system.W, 1, 2), xi[problem.pose_index][..., None])[..., 0]
    rhs = system.g_point + layout.by_point @ pull + system.calibration[1] @ change
    points = state.points - np.matmul(V_inv, rhs[..., None])[..., 0]
    by_name = dict(zip(problem.calibration, change.tolist(), strict=True))
    return _State(se3_exp(xi) @ state.T_cam_map, points,
                  state.focal_scale * np.exp(by_name.get('focal', 0.0) / state.focal_scale),
                  state.radial + by_name.get('radial', 0.0),
                  state.shift + by_name.get('shift', 0.0))


def _reduced(problem: BundleProblem, layout: _Layout, system: _System, V_inv: np.ndarray,
             damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Reduced camera system S, b: free poses, then what is refined of the calibration."""
    n, extra = len(layout.free), len(problem.calibration)
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
    if extra:
        by_pose, by_point, h, g = system.calibration
        mixed = Y @ by_point[problem.point_index]  # [O, 6, m]
        summed = (layout.by_pose @ mixed.reshape(len(mixed), -1)).reshape(-1, 6, extra)
        S[:6 * n, 6 * n:] = (by_pose - summed)[layout.free].reshape(6 * n, extra)
        S[6 * n:, :6 * n] = S[:6 * n, 6 * n:].T
        weighted = np.swapaxes(by_point, 1, 2) @ V_inv  # [L, m, 3]
        S[6 * n:, 6 * n:] = _damped(h, damping) - (weighted @ by_point).sum(0)
        b[6 * n:] = g - (weighted @ system.g_point[..., None]).sum(0)[:, 0]
    return S, b
