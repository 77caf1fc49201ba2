"""Figures of a network on windows of views."""

from __future__ import annotations

import torch

SHORTEST_BASELINE = 0.02  # of the scene's scale: nearer pairs have no direction
AUC_DEG = 30


def pose_errors(T_cam_world: torch.Tensor, truth: torch.Tensor,
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """Degrees of rotation and direction [pairs] between poses [B, N, 4, 4] and the true ones.

    True lengths are in a unit in which shorter baselines than SHORTEST_BASELINE mean nothing.
    """
    mine, true = _relative(T_cam_world), _relative(truth)
    far = true[..., :3, 3].norm(dim=-1) > SHORTEST_BASELINE
    residual = mine[..., :3, :3].transpose(-1, -2) @ true[..., :3, :3]
    rotation = _degrees((residual.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2)
    cosine = torch.cosine_similarity(mine[..., :3, 3], true[..., :3, 3], dim=-1)
    return rotation[far], _degrees(cosine)[far]


def abs_rel(depth: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean of |d - d*| / d* over pixels of known depth d* > 0, after the best median scale."""
    known = truth > 0
    d, t = depth[known], truth[known]
    return ((d * (t / d).median() - t).abs() / t).mean()


def _relative(T_cam_world: torch.Tensor) -> torch.Tensor:
    """T_j_i [B, pairs, 4, 4] of all pairs i < j."""
    i, j = torch.triu_indices(T_cam_world.shape[1], T_cam_world.shape[1], 1)
    T = T_cam_world.double()
    return T[:, j] @ torch.linalg.inv(T[:, i])


def _degrees(cosine: torch.Tensor) -> torch.Tensor:
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
