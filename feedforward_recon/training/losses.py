"""Losses of the descriptor encoder."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def matching_loss(desc_a: torch.Tensor, desc_b: torch.Tensor, pixels_a: torch.Tensor,
                  pixels_b: torch.Tensor, temperature: float, safe_radius_px: float,
                  same: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE (van den Oord et al. 2018, eq. 4) in both directions over a batch of pairs.

    desc_a, desc_b: [B, N, D]; row n of both describes the same scene point where ``same``
    [B, N] is true (everywhere without it); the other rows only serve as negatives. pixels_a,
    pixels_b: [B, N, 2]. Every other point of the batch is a negative, except points of the
    same image nearer than ``safe_radius_px``: their views overlap too much to be told apart.
    Returns the loss and the mask [B, N] of points whose match is the mutual best.
    """
    batch, count, dim = desc_a.shape
    logits = desc_a.reshape(-1, dim) @ desc_b.reshape(-1, dim).T / temperature
    target = torch.arange(batch * count)
    blocked = torch.zeros_like(logits, dtype=torch.bool)
    for i in range(batch):
        span = slice(i * count, (i + 1) * count)
        near_a = torch.cdist(pixels_a[i], pixels_a[i]) < safe_radius_px
        near_b = torch.cdist(pixels_b[i], pixels_b[i]) < safe_radius_px
        blocked[span, span] = near_a | near_b
    blocked.fill_diagonal_(False)
    logits = logits.masked_fill(blocked, -1e4)
    wanted = target if same is None else target[same.flatten()]
    loss = 0.5 * (F.cross_entropy(logits[wanted], wanted)
                  + F.cross_entropy(logits.T[wanted], wanted))
    mutual = (logits.argmax(1) == target) & (logits.argmax(0) == target)
    mutual = mutual.reshape(batch, count)
    return loss, mutual if same is None else mutual & same


def confidence_loss(logit_a: torch.Tensor, logit_b: torch.Tensor, mutual: torch.Tensor,
                    same: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy [B, N]: a point is confident where its match was the mutual best.

    A point of a that b shows and the detector missed there is not; rows that are neither the
    ``same`` point nor ``missed`` say nothing.
    """
    target = mutual.float()
    told_a, told_b = same | missed, same
    return 0.5 * (F.binary_cross_entropy_with_logits(logit_a[told_a], target[told_a])
                  + F.binary_cross_entropy_with_logits(logit_b[told_b], target[told_b]))


def imitation_loss(desc_a: torch.Tensor, desc_b: torch.Tensor, told_a: torch.Tensor,
                   told_b: torch.Tensor, temperature: float,
                   teacher_temperature: float) -> torch.Tensor:
    """Which points of the other image a teacher finds alike (Hinton et al. 2015), both ways.

    desc_a, desc_b [B, N, D] and the teacher's told_a, told_b [B, N, T], all of unit length. Only
    likeness within a pair of images is compared, so the lengths D and T may differ.
    """
    ours = desc_a @ desc_b.transpose(1, 2) / temperature
    theirs = told_a @ told_b.transpose(1, 2) / teacher_temperature
    return 0.5 * sum((F.kl_div(F.log_softmax(ours, d), F.log_softmax(theirs, d),
                               reduction='sum', log_target=True) for d in (1, 2)),
                     start=torch.zeros(())) / ours.shape[:2].numel()
