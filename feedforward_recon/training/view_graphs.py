"""Graphs of views to train latent alignment on: their tree, their pairs, and what these cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch.nn import functional as F

from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.pose_encoding import rigid_inverse
from feedforward_recon.model.ray_stem import PATCH
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.reconstruction.scene_graph import COSTS, minimum_spanning_tree
from feedforward_recon.training.photo_losses import PairMaps, photo_loss
from feedforward_recon.training.transformer_losses import at_pixels
from feedforward_recon.training.windows import Windows

Edges = Sequence[tuple[int, int]]
FAR = 10.0  # units, from which a point is no longer asked for: its error would be all there is


def covisible_tree(window: Windows) -> Edges:
    """(parent, child) of the pairs of one window, parents before children.

    That in which views show the most of each other's points. Shortest paths would make a star of
    eight views, in which nothing is accumulated.
    """
    share = window.seen[0].float().mean(-1).cpu().numpy()
    similarity = (share + share.T) / 2
    pairs = np.array(list(combinations(range(len(share)), 2)))
    cost = COSTS['linear'](similarity[pairs[:, 0], pairs[:, 1]])
    return minimum_spanning_tree(len(share), pairs, cost, int(similarity.sum(0).argmax())).edges


def graph_loss(network: RayTransformer, window: Windows) -> torch.Tensor:
    """L_pair + 0.1 L_global of one window of N views; gradients reach latent alignment alone."""
    edges = covisible_tree(window)
    with torch.autocast(window.images.device.type, torch.bfloat16):
        maps = _pair_maps(network, window, torch.tensor(edges))
    cells = maps.points.shape[2] - window.known.shape[-1]  # where nothing is known
    truth = F.pad(window.points[0], (0, 0, cells, 0))
    valid = F.pad(_near(window)[0], (cells, 0))
    into = rigid_inverse(window.T_world_cam[0])[[parent for parent, _ in edges]]
    pairs = truth[torch.tensor(edges)]  # [E, 2, P, 3]
    pair_truth = torch.einsum('eab,evpb->evpa', into[:, :3, :3], pairs) + \
        into[:, None, None, :3, 3]
    known = valid[torch.tensor(edges)]
    return photo_loss(in_true_unit(maps, pair_truth, known), edges, pair_truth, truth, valid)


def in_true_unit(maps: PairMaps, truth: torch.Tensor, known: torch.Tensor) -> PairMaps:
    """The maps, each pair scaled so that its known points are as far as the true ones.

    truth: [E, 2, P, 3]; known: bool [E, 2, P].
    """
    ratio = truth.norm(dim=-1).clamp(min=1e-6).log() - maps.points.norm(dim=-1).log()
    count = known.flatten(1).sum(1).clamp(min=1)
    scale = ((ratio * known).flatten(1).sum(1) / count).exp()
    return PairMaps(maps.points * scale[:, None, None, None], maps.confidence)


def _pair_maps(network: RayTransformer, window: Windows, edges: torch.Tensor) -> PairMaps:
    """What the network says of pairs [E, 2] at all cells, and then at the known points."""
    grid_hw = window.images.shape[-2] // PATCH, window.images.shape[-1] // PATCH
    with torch.no_grad():
        seen = network.encode(window.images)
        patches = network.tokens.along_rays(seen.patches[None], window.K, grid_hw)
    aligned = network.aligned(patches)[0]
    cells, _ = network.decode(aligned[edges], seen.of(edges.flatten()), grid_hw,
                              demand=Demand(memory=False))
    maps = torch.cat([cells.points, cells.points_confidence[..., None].log()], -1).movedim(-1, 2)
    said = torch.cat([maps.flatten(3).mT, at_pixels(maps, window.pixels[0][edges])], 2)
    return PairMaps(said[..., :3], said[..., 3].exp())


def _near(window: Windows) -> torch.Tensor:
    """Known points [1, N, P] that are not much farther than the first view's."""
    return window.known & (window.depth < FAR)
