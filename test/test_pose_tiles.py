"""Bundle adjustment of many poses: the same steps as with a dense matrix, in less room."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from feedforward_recon.geometry import elimination
from feedforward_recon.geometry.bundle_rows import BundleProblem, BundleState, residuals
from feedforward_recon.geometry.elimination import BLOCK, Elimination
from feedforward_recon.geometry.normal_equations import linearise, solve
from feedforward_recon.geometry.pose_tiles import TILE, PoseTiles
from feedforward_recon.geometry.refine import bundle_adjust
from feedforward_recon.geometry.transforms import inverse, make_transform, se3_exp, so3_exp

ALL = ('focal', 'radial', 'shift')


def chain(poses, reach=3, depth=True, seed=0, points=None):
    """A row of cameras in shuffled order; the points before each are seen by ``reach`` more."""
    rng = np.random.default_rng(seed)
    at = rng.permutation(poses)
    T = make_transform(so3_exp(0.1 * rng.standard_normal((poses, 3))),
                       np.c_[at, 0.1 * rng.standard_normal((poses, 2))])
    x = np.linspace(0, poses - 1, points or 12 * poses)
    X = rng.uniform((-1, -1, 4), (1, 1, 8), (len(x), 3))
    X[:, 0] += x
    k, p = np.nonzero(abs(at[:, None] - x) <= reach)
    T_cam_map = inverse(T)[k]
    cam = np.einsum('oij,oj->oi', T_cam_map[:, :3, :3], X[p]) + T_cam_map[:, :3, 3]
    xy = cam[:, :2] / cam[:, 2:] + 1e-3 * rng.standard_normal((len(k), 2))
    fixed = at < 2
    T = np.where(fixed[:, None, None], T, T @ se3_exp(0.01 * rng.standard_normal((poses, 6))))
    inv_depth = 1 / cam[:, 2] if depth else np.full(len(k), np.nan)
    return BundleProblem(T, X, fixed, k, p, xy, inv_depth, np.ones(len(k)), 500.0, shifted=depth)


def room():
    """All cameras show the same, and there is no empty tile."""
    return chain(50, reach=50)


def islands():
    """Two rows of cameras that share no point, and cameras that see none, one of them fixed."""
    a, b = chain(40), chain(30, seed=1)
    T_far = make_transform(so3_exp(np.array([0.3, 0.2, 0.1])), np.array([0.0, 50.0, 0.0]))
    points = b.points @ T_far[:3, :3].T + T_far[:3, 3]
    blind = np.tile(np.eye(4), (3, 1, 1))
    return BundleProblem(
        np.concatenate([a.T_map_cam, T_far @ b.T_map_cam, blind]),
        np.concatenate([a.points, points]),
        np.concatenate([a.fixed, b.fixed, [False, True, False]]),
        np.concatenate([a.pose_index, len(a.fixed) + b.pose_index]),
        np.concatenate([a.point_index, len(a.points) + b.point_index]),
        np.concatenate([a.xy, b.xy]), np.concatenate([a.inv_depth, b.inv_depth]),
        np.ones(len(a.xy) + len(b.xy)), 500.0, shifted=True)


def one_block():
    """So few points that all are eliminated together, though no camera sees all of them."""
    return chain(70, reach=8, points=BLOCK)


SCENES = {'chain': lambda: chain(70), 'room': room, 'islands': islands, 'one block': one_block}


@pytest.fixture
def tiled(monkeypatch):
    """Switches to tiles and small pieces for any number of poses."""
    def switch():
        monkeypatch.setattr(elimination, 'FEW_POSES', 0)
        monkeypatch.setattr(elimination, 'PIECE', 500)
    return switch


def linearised(problem):
    """The order of elimination, and the equations at the start."""
    state = BundleState(inverse(problem.T_map_cam), problem.points)
    order = Elimination(problem)
    return order, linearise(problem, order, state, residuals(problem, state))


def one_step(problem, damping=1e-3):
    """The step of all poses [P, 6], of points and of the calibration."""
    order, system = linearised(problem)
    xi, points, change = solve(order, system, damping)
    every = np.zeros((len(problem.fixed), 6))
    every[order.free] = xi
    return order, np.concatenate([every.ravel(), points.ravel(), change])


@pytest.mark.parametrize('calibration', [(), ('focal',), ALL])
@pytest.mark.parametrize('name', SCENES)
def test_the_step_is_that_of_the_dense_matrix(name, calibration, tiled):
    problem = replace(SCENES[name](), calibration=calibration)
    dense, expected = one_step(problem)
    tiled()
    order, step = one_step(problem)
    assert dense.tiles is None and len(order.tiles.tile) > 1 and len(order.pieces) > 1
    np.testing.assert_allclose(step, expected, rtol=0, atol=1e-9 * abs(expected).max())


@pytest.mark.parametrize('part', ['U', 'calibration'])
def test_an_indefinite_system_has_no_step(part, tiled):
    problem = replace(chain(40), calibration=ALL)
    tiled()
    order, system = linearised(problem)
    assert solve(order, system, 1e-3) is not None
    assert solve(order, replace(system, **{part: -getattr(system, part)}), 1e-3) is None


@pytest.mark.parametrize('depth', [True, False])
def test_refined_poses_are_those_of_the_dense_matrix(depth, tiled):
    problem = chain(60, depth=depth)
    expected = bundle_adjust(problem, 8)
    tiled()
    result = bundle_adjust(problem, 8)
    assert result.cost_after < 0.1 * result.cost_before
    np.testing.assert_allclose(result.T_map_cam, expected.T_map_cam, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.points, expected.points, rtol=0, atol=1e-9)


def test_what_is_stored_of_a_chain_grows_with_its_length(tiled):
    """In whatever order its cameras come; a dense matrix grows with the square."""
    tiled()
    orders = [Elimination(chain(length)) for length in (100, 200, 400)]
    for order in orders:
        assert len(order.tiles) < 3 * len(order.free) / TILE
        assert len(order.tiles.zeros()) < 3 * TILE * (len(order.free) + TILE)
    per_block = [np.mean([len(poses) for *_, poses in order.blocks]) for order in orders]
    assert max(per_block) < 2 * min(per_block) < 50


def test_tiles_that_the_factorisation_fills_are_stored():
    """Poses that share points across the whole order leave no band."""
    rng, count = np.random.default_rng(0), 10 * TILE + 3
    i, j = np.stack([np.arange(count - 1), np.arange(1, count)]), rng.integers(count, size=(2, 12))
    shared = np.eye(count)
    for a, b in np.concatenate([i.T, j.T]):
        shared[a, b] = shared[b, a] = 1
    values = rng.standard_normal((6 * count, 6 * count)) * np.kron(shared, np.ones((6, 6)))
    S = values + values.T + 100 * np.eye(6 * count)
    tiles, b = PoseTiles(sparse.csr_array(shared)), rng.standard_normal((6 * count, 2))
    row, column = np.tril_indices(count)
    place = tiles.places(row, column)
    blocks = tiles.zeros()
    blocks[place[place >= 0]] = S.reshape(count, 6, count, 6)[row, :, column][place >= 0]
    assert len(tiles) < 0.9 * len(tiles.tile) * (len(tiles.tile) + 1) / 2
    np.testing.assert_allclose(tiles.solved(blocks, b), np.linalg.solve(S, b), atol=1e-12)


def test_each_observation_is_eliminated_once(tiled):
    problem = islands()
    tiled()
    order = Elimination(problem)
    free = np.flatnonzero(~problem.fixed[problem.pose_index])
    np.testing.assert_array_equal(np.sort(order.seen), free)
    np.testing.assert_array_equal(order.free[order.pose], problem.pose_index[order.seen])
    np.testing.assert_array_equal(order.point, problem.point_index[order.seen])
    parts = np.concatenate([np.arange(len(order.seen))[part] for part, *_ in order.blocks])
    np.testing.assert_array_equal(parts, np.arange(len(order.seen)))
    assert max(len(np.unique(order.point[part])) for part, *_ in order.blocks) <= BLOCK
