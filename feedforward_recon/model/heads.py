"""The camera head of VGGT: camera tokens -> pose encodings, refined in four passes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.layers import Block, BlockConfig, Mlp

ENCODING = 9
PASSES = 4


class CameraHead(nn.Module):
    """Softmax attention over the camera tokens of all frames, conditioned on the last guess.

    Each pass modulates the tokens by the previous raw encoding (as diffusion transformers do
    with time: Peebles and Xie 2023), runs a small transformer and adds a correction.
    """

    def __init__(self, dim: int, heads: int = 16, depth: int = 4) -> None:
        super().__init__()
        config = BlockConfig(dim, heads)
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, ENCODING))
        self.embed_pose = nn.Linear(ENCODING, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.trunk = nn.ModuleList([Block(config) for _ in range(depth)])
        self.pose_branch = Mlp(dim, dim // 2, ENCODING)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Camera tokens [B, N, C] -> encodings [4, B, N, 9], one per pass; use the last."""
        tokens = self.token_norm(tokens.to(self.token_norm.weight.dtype))
        raw, passes = None, []
        for _ in range(PASSES):
            delta = self._correction(tokens, raw)
            raw = delta if raw is None else raw.detach() + delta
            passes.append(torch.cat((raw[..., :7], F.relu(raw[..., 7:])), -1))
        return torch.stack(passes)

    def _correction(self, tokens: torch.Tensor, raw: torch.Tensor | None) -> torch.Tensor:
        previous = self.empty_pose_tokens if raw is None else raw.detach()
        modulation = self.poseLN_modulation(self.embed_pose(previous))
        shift, scale, gate = modulation.chunk(3, -1)
        plain = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        x = gate * (plain * (1 + scale) + shift) + tokens
        for block in self.trunk:
            x = block(x)
        return self.pose_branch(self.trunk_norm(x))
