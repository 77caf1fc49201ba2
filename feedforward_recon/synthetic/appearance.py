"""What a camera does to an image, as functions of tensors: focus, motion, light and noise.

Everything random comes from a generator, so a seed decides it; views need not be alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

SHARPEST_PX = 0.05  # a gaussian this narrow leaves the image as it is
LONGEST_SIGMA_PX = 3.0
MOTION_SAMPLES = 9
DARKEST = 1e-3  # where the slope of a gamma below 1 ends


@dataclass(frozen=True)
class Appearance:
    """How V views were taken.

    defocus_px [V]: sigma of a gaussian, up to 3; motion_px [V, 2]: path (right, down) of a point
    while the shutter is open; saturation [V]: 1 as it is, 0 grey; gamma [V]; gain [V, 3]:
    exposure times white balance; noise [V]: standard deviation as a share of white.
    """

    defocus_px: torch.Tensor
    motion_px: torch.Tensor
    saturation: torch.Tensor
    gamma: torch.Tensor
    gain: torch.Tensor
    noise: torch.Tensor

    @staticmethod
    def drawn(windows: int, views: int, generator: torch.Generator) -> Appearance:
        """Settings of B windows of N views in turn, half of the views sharp.

        A camera keeps most of its settings within a window; a part changes from view to view.
        On the generator's device.
        """
        def draw(low: float, high: float, each: int, *more: int) -> torch.Tensor:
            sample = torch.rand(windows, each, *more, generator=generator,
                                device=generator.device)
            return (low + (high - low) * sample).expand(-1, views, *more).flatten(0, 1)
        defocus_px, angle = draw(-1.0, 1.0, views).clamp(min=0), draw(0, 2 * torch.pi, views)
        length_px = draw(-4, 4, views).clamp(min=0)
        motion_px = length_px[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
        gamma = draw(0.7, 1.4, 1) * draw(0.92, 1.08, views)
        gain = draw(0.7, 1.2, 1, 1) * draw(0.92, 1.08, views, 1) * draw(0.9, 1.1, 1, 3)
        return Appearance(defocus_px, motion_px, draw(0.3, 1.2, 1), gamma, gain, draw(0, 0.02, 1))

    def applied(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Images [V, 3, H, W] in 0..1 as they would have been taken; noise from the generator."""
        defocus_px, motion_px, saturation, gamma, gain, noise = (
            tensor.to(images.device) for tensor in vars(self).values())
        blurry = _changed(images, defocused, defocus_px, defocus_px > SHARPEST_PX)
        blurry = _changed(blurry, motion_blurred, motion_px, motion_px.any(1))
        grey = blurry.mean(1, keepdim=True)
        blurry = grey + saturation[:, None, None, None] * (blurry - grey)
        grain = torch.randn(images.shape, generator=generator, device=generator.device)
        return exposed(blurry, gamma[:, None, None, None], gain[..., None, None],
                       noise[:, None, None, None] * grain.to(images.device))


def _changed(images: torch.Tensor, blurred: Callable[..., torch.Tensor], how: torch.Tensor,
             which: torch.Tensor) -> torch.Tensor:
    """The images, of which those that need it are blurred: half of them would be for nothing."""
    if not which.any():
        return images
    images = images.clone()
    images[which] = blurred(images[which], how[which])
    return images


def exposed(images: torch.Tensor, gamma: torch.Tensor, gain: torch.Tensor, grain: torch.Tensor
            ) -> torch.Tensor:
    """Images in 0..1 with another tone curve, exposure, white balance and grain; all broadcast."""
    return (images.clamp(min=DARKEST) ** gamma * gain + grain).clamp(0, 1)


def defocused(images: torch.Tensor, sigma_px: torch.Tensor) -> torch.Tensor:
    """Images [V, 3, H, W], each blurred by a gaussian of sigma_px [V], at most 3 pixels."""
    views, channels, height, width = images.shape
    reach = round(3 * LONGEST_SIGMA_PX)
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    sigma = sigma_px.clamp(SHARPEST_PX, LONGEST_SIGMA_PX)[:, None]
    weights = torch.exp(-0.5 * (offsets / sigma)**2)
    weights = (weights / weights.sum(-1, keepdim=True)).repeat_interleave(channels, 0)
    padded = F.pad(images, (reach,) * 4, 'replicate').flatten(0, 1)[None]
    blurred = F.conv2d(padded, weights[:, None, None, :], groups=views * channels)
    blurred = F.conv2d(blurred, weights[:, None, :, None], groups=views * channels)
    return blurred.view(views, channels, height, width)


def motion_blurred(images: torch.Tensor, motion_px: torch.Tensor) -> torch.Tensor:
    """Images [V, 3, H, W], each the mean along a straight path motion_px [V, 2] (right, down)."""
    views, _, height, width = images.shape
    still = torch.eye(2, 3, device=images.device).expand(views, 2, 3)
    grid = F.affine_grid(still, list(images.shape), align_corners=True)
    path = 2 * motion_px / motion_px.new_tensor([width - 1, height - 1])
    total = torch.zeros_like(images)
    for share in torch.linspace(-0.5, 0.5, MOTION_SAMPLES).tolist():
        total += F.grid_sample(images, grid + share * path[:, None, None], align_corners=True,
                               padding_mode='border')
    return total / MOTION_SAMPLES
