"""Losses of what any network says: cameras and depth, compared in the scale of each window."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from feedforward_recon.model.pose_encoding import rigid_inverse
from feedforward_recon.model.predictor import Answer
from feedforward_recon.training.windows import Windows

LARGEST_ERROR = 1.0  # of a turn, a place or a log depth: what is farther off is equally wrong


def answer_losses(said: Answer, windows: Windows) -> dict[str, torch.Tensor]:
    """Losses of depth, rotations and places of the views.

    The world is the first view, whatever the network made it.
    """
    T_world_cam, _, depth, _ = said
    log_depth = _at_pixels(depth.float().clamp(min=1e-6).log(), windows.pixels)
    known, true = windows.known, windows.depth.log()
    count = known.flatten(1).sum(1).clamp(min=1)
    log_scale = ((true - log_depth) * known).flatten(1).sum(1) / count  # [B]
    error = (log_depth + log_scale[:, None, None] - true).abs().clamp(max=LARGEST_ERROR)
    T = rigid_inverse(T_world_cam[:, :1].float()) @ T_world_cam.float()
    turn = (T[..., :3, :3] - windows.T_world_cam[..., :3, :3]).flatten(2).norm(dim=-1)
    place = T[..., :3, 3] * log_scale.exp()[:, None, None] - windows.T_world_cam[..., :3, 3]
    return {'depth': (error * known).sum() / known.sum().clamp(min=1),
            'turn': turn.clamp(max=LARGEST_ERROR).mean(),
            'place': place.norm(dim=-1).clamp(max=LARGEST_ERROR).mean()}


def _at_pixels(maps: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Maps [B, N, H, W] between pixels [B, N, P, 2], [B, N, P]."""
    size = torch.tensor([maps.shape[-1], maps.shape[-2]], device=maps.device)
    at = (2 * pixels + 1) / size - 1
    found = F.grid_sample(maps.flatten(0, 1)[:, None], at.flatten(0, 1)[:, None],
                          padding_mode='border', align_corners=False)
    return found[:, 0, 0].unflatten(0, maps.shape[:2])
