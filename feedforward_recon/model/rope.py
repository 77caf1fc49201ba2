"""Two-dimensional rotary position embedding (RoPE), the one place where it is computed.

Idea: rotating query and key by angles proportional to their positions makes their product
depend on the difference of the positions only (Su et al., "RoFormer", 2021, eq. 14). In two
dimensions the first half of a head is turned by the row y, the second half by the column x
(Heo et al., "Rotary position embedding for vision transformer", 2024). VGGT, pi3 and DA3 all
use base 100 and integer positions that start at 1; special tokens sit at (0, 0), where the
rotation is the identity.

Precision: angles are rounded to the dtype of the tokens *before* cosine and sine. That is how
the published weights were trained: where queries and keys are bfloat16, so are the angles.
"""

from __future__ import annotations

from functools import lru_cache

import torch

BASE = 100.0


def patch_positions(grid_hw: tuple[int, int], special: int,
                    device: torch.device | None = None, first: int = 1) -> torch.Tensor:
    """Positions int64 [special + h * w, 2] as (y, x): special tokens first, then patches.

    first: row and column of the first patch. Grids of one size share one tensor, so that what
    layers work out from it (`attention.blocks.cut`) is worked out once.
    """
    return _positions(tuple(grid_hw), special, device or torch.empty(0).device, first)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a training may use them as well
def _positions(grid_hw: tuple[int, int], special: int, device: torch.device,
               first: int) -> torch.Tensor:
    height, width = grid_hw
    rows, columns = torch.meshgrid(torch.arange(height, device=device),
                                   torch.arange(width, device=device), indexing='ij')
    patches = torch.stack((rows, columns), -1).reshape(-1, 2) + first
    return torch.cat((patches.new_zeros(special, 2), patches))


def rope_angles(positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Angles [P, 2, head_dim / 4] of positions [P, 2]; axis 1 is (y, x).

    head_dim must be a multiple of 4.
    """
    steps = torch.arange(0, head_dim // 2, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1 / BASE ** (steps / (head_dim // 2))
    return (positions.float()[..., None] * frequencies).to(dtype)


def rotate(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Tokens [..., T, D] turned by the positions [P, 2] of one frame; T is a multiple of P.

    Within each half, channel j turns with channel j + D / 4.
    """
    angles = rope_angles(positions, tokens.shape[-1], tokens.dtype)  # [P, 2, D/4]
    cos, sin = angles.cos(), angles.sin()
    frames = tokens.unflatten(-2, (-1, len(positions)))
    a, b = frames.unflatten(-1, (2, 2, -1)).unbind(-2)  # [..., T/P, P, 2, D/4]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -2)
    return turned.flatten(-3).flatten(-3, -2)
