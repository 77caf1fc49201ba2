"""Latent global alignment: all images of a collection agree before any two are decoded.

Light3R-SfM (arXiv 2501.14914, sec. 3.2). With F_i^0 the encoded tokens of image i and g_i^0 their
mean, each of L = 4 blocks does
    {g_i}^{l+1} = Self({g_i}^l),     F_i^{l+1} = Cross(F_i^l; {g_j}^{l+1} of all images j),
and the decoders get F_i = F_i^0 + what the blocks added. The paper leaves open what is inside a
block: here pre-norm attention and MLP, as in all blocks of this package. It adds F_i^L to F_i^0;
where blocks are residual, F_i^L holds F_i^0 already, so only the increment F_i^L - F_i^0 is added.
The last projections of Cross are zero at first, so a fresh module is the identity. Images have no
positions: their order does not matter.

Several processes may hold the images of one collection (`distributed`): latents, one vector of
each image, go to all of them, tokens stay where they are.

N images of T tokens cost N^2 + N (N T) pairs of queries and keys, and memory linear in N T.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.attention.base import Alone, Exchange
from feedforward_recon.model.layers import Block, BlockConfig, Mlp, in_chunks, rows_per_chunk

PUBLISHED_BLOCKS = 4


class CrossBlock(nn.Module):
    """Pre-norm block: tokens ask the latents of all images, then an MLP; both are added."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.norm1, self.norm_latents, self.norm2 = (
            nn.LayerNorm(config.dim, eps=config.norm_eps) for _ in range(3))
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.mlp = Mlp(config.dim, config.mlp_ratio * config.dim)
        for last in (self.proj, self.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Tokens [N, T, C] of some images and latents [M, C] of all -> [N, T, C]."""
        k, v = self.kv(self.norm_latents(latents)).unflatten(-1, (2, self.config.heads, -1)
                                                             ).permute(1, 2, 0, 3)  # [h, M, d]
        return in_chunks(lambda part: (self._both_steps(part, k, v),), (x,),
                         rows_per_chunk(x.shape[1], x.device))[0]

    def _both_steps(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = self.q(self.norm1(x)).flatten(0, 1).unflatten(-1, (self.config.heads, -1))
        seen = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None])[0]
        x = x + self.proj(seen.transpose(0, 1).flatten(1)).view_as(x)
        return x + self.mlp(self.norm2(x))


class AlignmentBlock(nn.Module):
    """Latents attend to each other, then tokens to latents."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.among, self.across = Block(config), CrossBlock(config)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [N, T, C] of some images and latents [M, C] of all -> the same shapes."""
        latents = self.among(latents[None])[0]
        return self.across(x, latents), latents


class LatentAlignment(nn.Module):
    """Tokens of all images of a collection -> tokens that know of each other."""

    def __init__(self, config: BlockConfig, depth: int = PUBLISHED_BLOCKS) -> None:
        super().__init__()
        self.exchange: Exchange = Alone()
        self.blocks = nn.ModuleList([AlignmentBlock(config) for _ in range(depth)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [N, T, C] of the N images of this process -> [N, T, C]."""
        x, latents = tokens, self.exchange.concatenate(tokens.mean(1), 0)
        for block in self.blocks:
            x, latents = block(x, latents)
        return x
