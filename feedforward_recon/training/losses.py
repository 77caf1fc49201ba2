"""Losses of the descriptor encoder."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def matching_loss(desc_a: torch.Tensor, desc_b: torch.Tensor, pixels_a: torch.Tensor,
                  pixels_b: torch.Tensor, temperature: float,
                  safe_radius_px: float) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE (van den Oord et al. 2018, eq. 4) in both directions over a batch of pairs.

    desc_a, desc_b: [B, N, D]; row n of both describes the same scene point. pixels_a,
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
    loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    mutual = (logits.argmax(1) == target) & (logits.argmax(0) == target)
    return loss, mutual.reshape(batch, count)


def confidence_loss(logit_a: torch.Tensor, logit_b: torch.Tensor,
                    mutual: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy: a point is confident where its match was the mutual best."""
    target = mutual.float()
    return 0.5 * (F.binary_cross_entropy_with_logits(logit_a, target)
                  + F.binary_cross_entropy_with_logits(logit_b, target))
