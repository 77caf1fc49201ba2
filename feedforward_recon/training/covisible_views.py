"""Views that show the same things from different places, and windows drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.synthetic.covisibility import PosedDepth, covisible

ANGLE_DEG = (5.0, 45.0)  # between a view and the one that it was drawn for
STAR_SHARE = 0.6  # of windows whose views all belong to the first one
TRIES = 20
# Coarse depth is that of one pixel for many: at slopes it is a little off.
COARSE_TOLERANCE = 0.05


@dataclass(frozen=True)
class CovisibleViews:
    """belong: bool [N, N], which views may stand beside each other in a window; symmetric."""

    belong: NDArray[np.bool_]

    @staticmethod
    def of(shared: NDArray[np.bool_], T_world_cam: NDArray, depth: NDArray) -> CovisibleViews:
        """Those that share enough, bool [N, N], at an angle within ``ANGLE_DEG``.

        T_world_cam [N, 4, 4] and depth [N], the median of each view: in one unit of length.
        """
        angle = view_angles_deg(T_world_cam, depth)
        belong = shared & (angle >= ANGLE_DEG[0]) & (angle <= ANGLE_DEG[1])
        return CovisibleViews(belong & ~np.eye(len(belong), dtype=bool))

    def drawn(self, rng: np.random.Generator, count: int) -> NDArray[np.int64] | None:
        """Views around the first one, or a chain of views that each belong to one before.

        None where there are not so many.
        """
        for _ in range(TRIES):
            chosen = [int(rng.integers(len(self.belong)))]
            star = rng.random() < STAR_SHARE
            while len(chosen) < count:
                to = chosen[:1] if star else [chosen[int(rng.integers(len(chosen)))]]
                free = self._free(to, chosen)
                if not len(free):
                    free = self._free(chosen, chosen)
                if not len(free):
                    break
                chosen.append(int(rng.choice(free)))
            if len(chosen) == count:
                return np.array(chosen)
        return None

    def _free(self, to: Sequence[int], chosen: Sequence[int]) -> NDArray[np.int64]:
        return np.setdiff1d(np.flatnonzero(self.belong[list(to)].any(0)), chosen)


def view_angles_deg(T_world_cam: NDArray, depth: NDArray) -> NDArray[np.float64]:
    """Degrees [N, N] by which views differ: how far one is turned, or how far apart rays meet.

    The larger of the two: cameras that move sideways without turning see other views as well.
    depth [N]: median of each view, in the unit of T_world_cam [N, 4, 4]; infinite where unknown.
    """
    R, centre = T_world_cam[:, :3, :3], T_world_cam[:, :3, 3]
    cosine = (np.einsum('aij,bij->ab', R, R) - 1) / 2
    turned = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    baseline = np.linalg.norm(centre[:, None] - centre, axis=-1)
    meeting = 2 * np.degrees(np.arctan(baseline / (depth[:, None] + depth)))
    return np.maximum(turned, meeting)


def seen_shares(views: PosedDepth) -> NDArray[np.float64]:
    """Share of the known pixels of view i that view j sees, [N, N], of views [N, H, W]."""
    known = (views.depth > 0).flatten(1).sum(1).clamp(min=1)
    rows = []
    for i in range(len(views.depth)):
        one = PosedDepth(views.depth[i], views.K[i], views.T_world_cam[i])
        seen = covisible(one, views, COARSE_TOLERANCE).seen
        rows.append(seen.flatten(1).sum(1) / known[i])
    return torch.stack(rows).numpy().astype(float)
