"""Losses of the geometry transformer (VGGT: Wang et al., CVPR 2025, sec. 3.4).

Lengths are in units of the mean distance of the first view's points from its camera, so
nothing here depends on the size of a scene.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.pose_encoding import encode_cameras
from feedforward_recon.model.vit import PATCH
from feedforward_recon.training.transformer_data import Windows

PASS_DECAY = 0.6
FOV_WEIGHT = 0.5
HUBER = 0.05
CONFIDENCE_WEIGHT = 0.2
TEMPERATURE = 0.1
DEPTH_TOLERANCE = 0.05
SAMPLES = 2  # per patch and direction


class TrainingHeads(nn.Module):
    """Linear read-outs of patch tokens that guide the training and are thrown away after it.

    match: of the image encoder's tokens, to be alike where patches show the same place.
    geometry: of the last tokens, SAMPLES^2 world points and log depths per patch.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.match = nn.Linear(dim, 64)
        self.norm = nn.LayerNorm(2 * dim)
        self.geometry = nn.Linear(2 * dim, 4 * SAMPLES**2)

    def points_and_depth(self, tokens: torch.Tensor, grid_hw: tuple[int, int],
                         ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, N, h * w, 2 C] -> points [B, N, 2h, 2w, 3] and depth [B, N, 2h, 2w]."""
        said = self.geometry(self.norm(tokens)).float()
        said = said.unflatten(-1, (SAMPLES, SAMPLES, 4)).unflatten(2, grid_hw)
        said = said.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return said[..., :3], said[..., 3].exp()


def camera_target(windows: Windows) -> torch.Tensor:
    """The true pose encodings [B, N, 9]."""
    height, width = windows.depth.shape[-2:]
    return encode_cameras(windows.T_cam_world, windows.K, (height, width))


def camera_loss(encodings: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Huber loss of encodings [passes, B, N, 9] against [B, N, 9]; late passes count most."""
    passes = len(encodings)
    decay = PASS_DECAY ** torch.arange(passes - 1, -1, -1).to(encodings)
    error = F.smooth_l1_loss(encodings, target.expand_as(encodings), reduction='none', beta=HUBER)
    error = error.mean((1, 2))  # [passes, 9]
    weighted = error[:, :3].sum(1) + error[:, 3:7].sum(1) + FOV_WEIGHT * error[:, 7:].sum(1)
    return (decay * weighted).mean()


def confident_loss(error: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """Errors, plainly and weighted by a confidence of at least 1, which is paid for.

    Zero for no error at confidence 1; doubt lowers the cost of errors above 0.2.
    """
    weighted = error * confidence - CONFIDENCE_WEIGHT * confidence.log()
    return (weighted + error).mean()


def patch_loss(points: torch.Tensor, depth: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Error of the points and depths that `TrainingHeads` reads from all patches."""
    step = PATCH // SAMPLES
    true_points = windows.points[:, :, step // 2::step, step // 2::step]
    true_depth = windows.depth[:, :, step // 2::step, step // 2::step]
    return (points - true_points).abs().mean() + (depth - true_depth).abs().mean()


def feature_logits(features: torch.Tensor) -> torch.Tensor:
    """Likeness [B, i, j, P, P] of the patches of all pairs of views, of features [B, N, P, C]."""
    unit = F.normalize(features.float(), dim=-1)
    return torch.einsum('bipc,bjqc->bijpq', unit, unit) / TEMPERATURE


def attention_logits(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What softmax attention compares [B, i, j, P, P], of queries and keys [B, N, P, d]."""
    scale = queries.shape[-1] ** -0.5
    return torch.einsum('bipc,bjqc->bijpq', queries.float(), keys.float()) * scale


def match_loss(logits: torch.Tensor, target: torch.Tensor, visible: torch.Tensor,
               ) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018) between the patches of all pairs of views.

    logits: [B, i, j, P, P]; each patch p of view i whose middle is seen by view j should be
    most like the patch that it falls into there (`matching_patches`).
    """
    if not visible.any():
        return logits.sum() * 0
    return F.cross_entropy(logits[visible], target[visible])


def first_view_loss(queries: torch.Tensor, keys: torch.Tensor, target: torch.Tensor,
                    visible: torch.Tensor) -> torch.Tensor:
    """Softmax attention of later views should find their match in the first view.

    queries, keys: [B, N, T, d] of all tokens, patches last; target, visible: of
    `matching_patches`. Unlike in `match_loss` all tokens of all views compete, as they do in
    the attention itself: this teaches which view is the world.
    """
    patches = target.shape[-1]
    special = queries.shape[2] - patches
    logits = torch.einsum('bipc,bkc->bipk', queries[:, 1:, special:].float(),
                          keys.flatten(1, 2).float()) * queries.shape[-1] ** -0.5
    seen = visible[:, 1:, 0]
    if not seen.any():
        return logits.sum() * 0
    return F.cross_entropy(logits[seen], special + target[:, 1:, 0][seen])


def matching_patches(windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
    """For each patch of view i the patch of view j that shows its middle: [B, i, j, h * w].

    Returns its number, and whether it is really seen there: inside the image, not hidden,
    and i is not j.
    """
    height, width = windows.depth.shape[-2:]
    half = slice(PATCH // 2, None, PATCH)
    middle = windows.points[:, :, half, half].flatten(2, 3)  # [B, i, P, 3]
    T = windows.T_cam_world
    seen = torch.einsum('bjrc,bipc->bijpr', T[..., :3, :3], middle) \
        + T[:, None, :, None, :3, 3]
    z = seen[..., 2].clamp(min=1e-6)
    focal = windows.K.diagonal(dim1=-2, dim2=-1)[:, None, :, None, :2]
    pixels = seen[..., :2] / z[..., None] * focal + windows.K[:, None, :, None, :2, 2]
    u, v = pixels.round().long().unbind(-1)
    inside = (u >= 0) & (v >= 0) & (u < width) & (v < height) & (seen[..., 2] > 0)
    u, v = u.clamp(0, width - 1), v.clamp(0, height - 1)
    batch = torch.arange(len(T))[:, None, None, None]
    view = torch.arange(T.shape[1])[:, None]
    found = windows.depth[batch, view, v, u]
    visible = inside & ((found - z).abs() < DEPTH_TOLERANCE * z)
    visible &= ~torch.eye(T.shape[1], dtype=torch.bool)[..., None]
    return v // PATCH * (width // PATCH) + u // PATCH, visible
