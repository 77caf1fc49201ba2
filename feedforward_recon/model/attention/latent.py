"""``latent``: frames exchange one vector each.

Light3R-SfM (arXiv 2501.14914, sec. 3.2, latent global alignment). Each frame is summarised by
the mean g_i of its tokens; the summaries attend to each other, and every token attends to all
summaries:
    {g}' = g + Self({g}),     out = Cross(x; {g}').
The state is the list of summaries before Self (C numbers per frame), so the order of writing
does not matter and reading derives the rest.
Departures: the paper runs four such layers between encoder and decoder and carries g from one
to the next; here every global layer summarises its own input, so that the mechanism can
replace any attention. Cross reuses the official `qkv`, `proj` and norms; Self has its own
parameters and starts as the identity (the paper does not say). No positions: a frame has none.
Cost: N F + F^2 pairs for N tokens of F frames; state F C numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.attention.base import (
    Layout,
    QkvAttention,
    State,
    append,
    merge_heads,
    require_written,
)
from feedforward_recon.model.attention.config import AttentionConfig


@dataclass(frozen=True)
class LatentState(State):
    """Mean token of every frame, [B, frames, C]."""

    latents: torch.Tensor


class LatentAttention(QkvAttention):
    """One latent per frame."""

    state_type = LatentState

    def __init__(self, config: AttentionConfig, layer_index: int = 0) -> None:
        super().__init__(config, layer_index)
        self.latent_norm = nn.LayerNorm(config.dim)
        self.latent_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.latent_proj = nn.Linear(config.dim, config.dim)
        nn.init.zeros_(self.latent_proj.weight)
        nn.init.zeros_(self.latent_proj.bias)

    def empty_state(self, batch: int) -> LatentState:
        """A scene without frames."""
        return LatentState(self.no_tokens(batch, 0, self.config.dim))

    def write(self, chunks: tuple[torch.Tensor, ...], state: LatentState,
              layout: Layout) -> LatentState:
        """Append the mean token of each frame."""
        means = torch.cat([chunk.unflatten(1, (-1, layout.tokens)).mean(2)
                           for chunk in chunks], 1)
        return LatentState(append(state.latents, self.exchange.concatenate(means, 1), 1))

    def readable(self, state: LatentState) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, h, frames, d] of the latents after they saw each other."""
        require_written(state.latents.shape[1])
        latents = state.latents
        q, k, v = (self.split_heads(part)
                   for part in self.latent_qkv(self.latent_norm(latents)).chunk(3, -1))
        seen = merge_heads(F.scaled_dot_product_attention(q, k, v))
        keys, values = self.raw_keys_values(latents + self.latent_proj(seen))
        return self.turned(self.k_norm, keys, None), values

    def read(self, chunk: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor],
             layout: Layout) -> torch.Tensor:
        """Attend from each token to the latents."""
        keys, values = memory
        q = self.turned(self.q_norm, self.raw_queries(chunk), None)
        return F.scaled_dot_product_attention(q.to(values.dtype), keys.to(values.dtype), values)
