"""Losses of photos that are put together pair by pair (Light3R-SfM, sec. 3.4 and 3.5).

L = L_pair + 0.1 L_global: pointmaps of each pair, and those of all images after they were
accumulated along a tree, in the way of `reconstruction` but differentiable. A pointmap counts by
its confidence C: C e - 0.2 log C for an error e (DUSt3R; the sign of the paper's last term would
reward confidence without bound). Gradients pass through the alignments, too: that of a rotation
by its closed form, which is bounded as long as the points determine it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from feedforward_recon.training.aligning_rotation import aligning_rotation

CONFIDENCE_REWARD = 0.2
GLOBAL_WEIGHT = 0.1
LEAST_WEIGHT = 1e-6  # of a correspondence: points of confidence 1 count a little


@dataclass(frozen=True)
class PairMaps:
    """Pointmaps of E pairs (parent, child), both in the frame of the parent.

    points: [E, 2, P, 3]; confidence: [E, 2, P], at least 1.
    """

    points: torch.Tensor
    confidence: torch.Tensor


def aligned_points(source: torch.Tensor, target: torch.Tensor, weights: torch.Tensor,
                   points: torch.Tensor, *, with_scale: bool = True) -> torch.Tensor:
    """Points [..., 3] moved as source [P, 3] is best moved to target (Umeyama 1991, weighted).

    weights: [P], positive. with_scale: a similarity instead of a rigid motion.
    """
    share = weights / weights.sum()
    mean_source, mean_target = share @ source, share @ target
    centred, wanted = source - mean_source, target - mean_target
    M = wanted.T @ (share[:, None] * centred)
    R = aligning_rotation(M)
    scale = (R * M).sum() / (share @ centred.square().sum(1)) if with_scale else 1.0
    return scale * (points - mean_source) @ R.T + mean_target


def accumulated_pointmaps(maps: PairMaps, edges: Sequence[tuple[int, int]], *,
                          with_scale: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Pointmaps [N, P, 3] and confidences [N, P] of all images, in the frame of the root.

    edges: (parent, child) of each of the N - 1 pairs, parents before children, numbered from 0.
    An edge moves its pair to where its parent is already, weighted by the logarithm of both
    confidences, whose geometric mean the parent keeps.
    """
    root = edges[0][0]
    points = {root: maps.points[0, 0]}
    confidence = {root: maps.confidence[0, 0]}
    for (parent, child), pair, sure in zip(edges, maps.points, maps.confidence, strict=True):
        confidence[parent] = (confidence[parent] * sure[0]).sqrt()
        weights = confidence[parent].log() + LEAST_WEIGHT
        points[child] = aligned_points(pair[0], points[parent], weights, pair[1],
                                       with_scale=with_scale)
        confidence[child] = sure[1]
    order = range(len(points))
    return (torch.stack([points[image] for image in order]),
            torch.stack([confidence[image] for image in order]))


def pointmap_loss(points: torch.Tensor, confidence: torch.Tensor, truth: torch.Tensor,
                  valid: torch.Tensor) -> torch.Tensor:
    """Mean of C e - 0.2 log C over the valid points [...] of pointmaps [..., 3]."""
    error = (points - truth).norm(dim=-1)
    return (confidence * error - CONFIDENCE_REWARD * confidence.log())[valid].mean()


def global_loss(points: torch.Tensor, confidence: torch.Tensor, truth: torch.Tensor,
                valid: torch.Tensor) -> torch.Tensor:
    """Loss of accumulated pointmaps [N, P, 3] against the truth, after one similarity.

    The pointmaps move to the truth: the other way round, smaller ones would be better ones.
    confidence [N, P] does not weigh the similarity. valid: bool [N, P], where there is truth.
    """
    moved = aligned_points(points[valid], truth[valid], torch.ones_like(confidence[valid]), points)
    return pointmap_loss(moved, confidence, truth, valid)


def photo_loss(maps: PairMaps, edges: Sequence[tuple[int, int]], pair_truth: torch.Tensor,
               truth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_pair + 0.1 L_global of the pairs of a tree.

    pair_truth: [E, 2, P, 3], in the frames and the units in which pairs are to be said; truth
    [N, P, 3] in one frame, known where ``valid`` [N, P].
    """
    points, confidence = accumulated_pointmaps(maps, edges)
    of_pairs = pointmap_loss(maps.points, maps.confidence, pair_truth, valid[torch.tensor(edges)])
    return of_pairs + GLOBAL_WEIGHT * global_loss(points, confidence, truth, valid)
