"""Pairs whose rotations agree with those of all others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from feedforward_recon.geometry.rotation_averaging import averaged_rotations, turns_left
from feedforward_recon.reconstruction.comparisons import edges_of
from feedforward_recon.reconstruction.pairs import Edge, PairGeometry, Pairs, with_rotation
from feedforward_recon.reconstruction.scene_graph import minimum_spanning_tree
from feedforward_recon.reconstruction.shots import Shot

# A pair whose rotation is this far from what the others say together is wrong, or of another place
# that looks the same.
MAX_TURN = np.deg2rad(5.0)
ENOUGH_MATCHES = 300  # a pair with more is not surer of its rotation


def agreeing(shots: Sequence[Shot], pairs: Pairs) -> dict[Edge, PairGeometry]:
    """Connected pairs with rotations that agree with all others; the others are gone."""
    if not pairs:
        return {}
    images, edges = np.unique(edges_of(pairs), return_inverse=True)
    i, j = edges.reshape(-1, 2).T
    sizes = np.minimum([len(pair) for pair in pairs.values()], ENOUGH_MATCHES)
    R_i_j = np.stack([pair.T_i_j[:3, :3] for pair in pairs.values()])
    R = _chained(len(images), i, j, R_i_j, 1 / sizes)
    R = averaged_rotations(R, i, j, R_i_j, np.sqrt(sizes))
    left = np.linalg.norm(turns_left(R, i, j, R_i_j), axis=1)
    better = [with_rotation(pair, shots, R[a].T @ R[b]) for pair, a, b, turn in
              zip(pairs.values(), i, j, left, strict=True) if turn < MAX_TURN]
    return {(pair.i, pair.j): pair for pair in better if pair is not None}


def _chained(count: int, i: np.ndarray, j: np.ndarray, R_i_j: np.ndarray, cost: np.ndarray
             ) -> np.ndarray:
    """Rotations [N, 3, 3] to start from: along the cheapest tree of pairs."""
    R = np.tile(np.eye(3), (count, 1, 1))
    measured = dict(zip(zip(i.tolist(), j.tolist(), strict=True), R_i_j, strict=True))
    for a, b in minimum_spanning_tree(count, np.stack([i, j], 1), cost, 0).edges:
        R[b] = R[a] @ (measured[a, b] if (a, b) in measured else measured[b, a].T)
    return R
