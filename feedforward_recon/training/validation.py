"""How good a network is on fixed windows of scenes that it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from feedforward_recon.model.pose_encoding import rigid_inverse
from feedforward_recon.model.ray_cameras import geometry_of
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.training.transformer_losses import at_pixels
from feedforward_recon.training.transformer_scores import AUC_DEG, pose_errors
from feedforward_recon.training.view_sources import ViewSource
from feedforward_recon.training.windows import Windows, drawn_window

WINDOWS, VIEWS = 4, 6  # of each scene, of each window
LANDSCAPE, PORTRAIT = (256, 192), (192, 256)
SEED = 5


class ValidationWindows:
    """Windows of sources, as they are."""

    def __init__(self, sources: Sequence[ViewSource]) -> None:
        rng = np.random.default_rng(SEED)
        self._windows: dict[str, list[Windows]] = {}
        for source in sources:
            drawn = [whole_window(source, rng, VIEWS) for _ in range(WINDOWS)]
            self._windows[source.name] = [window for window in drawn if window is not None]

    @torch.inference_mode()
    def scores(self, network: RayTransformer, device: torch.device
               ) -> dict[str, dict[str, float]]:
        """Of each source: AUC@30 of poses and AbsRel of depth, from matches and without them."""
        rows: dict[str, dict[str, float]] = {}
        for name, windows in self._windows.items():
            each = [_scores(network, window.to(device)) for window in windows]
            rows[name] = {key: round(float(np.mean([s[key] for s in each])), 4)
                          for key in each[0]} if each else {}
        return rows

    @staticmethod
    def mean_auc(rows: dict[str, dict[str, float]]) -> float:
        """What the best weights are chosen by; 0 where nothing is held out."""
        scored = [row['auc30'] + row['auc30_points'] for row in rows.values() if row]
        return float(np.mean(scored)) if scored else 0.0


def whole_window(source: ViewSource, rng: np.random.Generator, views: int) -> Windows | None:
    """A window of so many views of a source as they are; None as for ``drawn_window``."""
    width, height = source.size_wh
    size_wh = LANDSCAPE if width >= height else PORTRAIT
    return drawn_window(source, rng, views, size_wh, varied=False)


def _scores(network: RayTransformer, windows: Windows) -> dict[str, float]:
    cells, _ = network(windows.images, windows.K)
    matched, said = (geometry_of(cells, windows.K, network, first=first)
                     for first in (True, False))
    return {'auc30': _auc(matched.T_world_cam, windows),
            'auc30_points': _auc(said.T_world_cam, windows),
            'abs_rel': _abs_rel(matched.log_depth, windows),
            'abs_rel_said': _abs_rel(said.log_depth, windows)}


def _auc(T_world_cam: torch.Tensor, windows: Windows) -> float:
    T = rigid_inverse(T_world_cam[:, :1]) @ T_world_cam
    turn, direction = pose_errors(rigid_inverse(T), rigid_inverse(windows.T_world_cam))
    worst = torch.maximum(turn, direction)
    return float((1 - worst / AUC_DEG).clamp(min=0).mean()) if len(worst) else 1.0


def _abs_rel(log_depth: torch.Tensor, windows: Windows) -> float:
    said = at_pixels(log_depth[:, :, None], windows.pixels)[..., 0]
    error = (windows.depth.log() - said)[windows.known]
    return float(((error - error.median()).exp() - 1).abs().mean())
