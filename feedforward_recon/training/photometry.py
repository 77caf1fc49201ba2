"""Exposure, colour and noise of views, changed at random."""

from __future__ import annotations

import torch


def varied_light(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [B, N, 3, H, W] in 0..1 of windows whose camera changes its settings a little.

    A camera keeps most of its settings within a window; a part changes from view to view.
    """
    shape = images.shape

    def draw(low: float, high: float, channels: int = 1) -> torch.Tensor:
        sample = torch.rand(*shape[:2], channels, 1, 1, generator=generator)
        return low + (high - low) * sample

    gamma = draw(0.7, 1.4)[:, :1] * draw(0.92, 1.08)
    gain = draw(0.7, 1.2)[:, :1] * draw(0.92, 1.08) * draw(0.9, 1.1, 3)[:, :1]
    noise = draw(0.0, 0.02)[:, :1] * torch.randn(shape, generator=generator)
    grey = images.mean(2, keepdim=True)
    images = grey + draw(0.3, 1.2)[:, :1] * (images - grey)
    return (images.clamp(min=1e-3) ** gamma * gain + noise).clamp(0, 1)
