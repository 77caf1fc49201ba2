"""Which view becomes the first one, when the network is free to choose (DA3).

The view should be neither an outlier nor an average one: each criterion is brought to 0..1
over the views, and the view nearest to the middle of all criteria wins.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from feedforward_recon.errors import ConfigError


def balance_scores(tokens: torch.Tensor) -> torch.Tensor:
    """Distance from the middle, float64 [B, N], of views with class tokens [B, N, C].

    Criteria: mean cosine with the other views, length of the token, variance over the
    channels of the token's direction.
    """
    tokens = tokens.double()
    direction = F.normalize(tokens, dim=-1)
    cosines = direction @ direction.transpose(-1, -2)
    others = max(1, tokens.shape[1] - 1)
    similarity = (cosines.sum(-1) - cosines.diagonal(dim1=-2, dim2=-1)) / others
    criteria = (similarity, tokens.norm(dim=-1), direction.var(-1))
    return torch.stack([(_spread(values) - 0.5).abs() for values in criteria]).sum(0)


def choose(tokens: torch.Tensor, strategy: str) -> torch.Tensor:
    """Index [B] of the reference view, from class tokens [B, N, C].

    Raises ConfigError for an unknown strategy.
    """
    if strategy in ('first', 'middle'):
        index = 0 if strategy == 'first' else tokens.shape[1] // 2
        return torch.full((len(tokens),), index, device=tokens.device)
    if strategy == 'saddle_balanced':
        return balance_scores(tokens).argmin(-1)
    if strategy == 'saddle_sim_range':
        direction = F.normalize(tokens, dim=-1)
        cosines = direction @ direction.transpose(-1, -2)
        cosines = cosines - torch.diag_embed(cosines.diagonal(dim1=-2, dim2=-1))
        return (cosines.amax(-1) - cosines.amin(-1)).argmax(-1)
    raise ConfigError('expected the reference view by saddle_balanced, saddle_sim_range, '
                      f'middle or first, found {strategy!r}')


def order_from(reference: torch.Tensor, count: int) -> torch.Tensor:
    """Order [B, count] with the reference view [B] first and the others as they were."""
    views = torch.arange(count, device=reference.device).expand(len(reference), -1)
    return torch.where(views == reference[:, None], -1, views).argsort(-1)


def reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Views [B, N, ...] in another order [B, N]."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def _spread(values: torch.Tensor) -> torch.Tensor:
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low + 1e-8)
