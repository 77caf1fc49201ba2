"""What the guiding losses of the transformer look at inside a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from feedforward_recon.model.attention.ttt import TttAttention, unit
from feedforward_recon.model.layers import GlobalBlock
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.training.transformer_losses import TEMPERATURE


class GuideInputs:
    """Encoded patches, and queries and keys of some global blocks, of the last forward pass."""

    def __init__(self, network: Vggt, blocks: Sequence[int]) -> None:
        """Hooks stay in the network as long as it lives."""
        self._encoded: torch.Tensor | None = None
        self._joined: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._blocks = {block: cast(GlobalBlock, network.aggregator.global_blocks[block])
                        for block in blocks}

        def keep_encoded(module: nn.Module, inputs: object, encoded: torch.Tensor) -> None:
            self._encoded = encoded

        def keep_joined(block: int, module: nn.Module, inputs: tuple[torch.Tensor, ...],
                        named: dict[str, Any]) -> None:
            self._joined[block] = inputs[0], named['positions']
        network.aggregator.patch_embed.register_forward_hook(keep_encoded)
        for index, block in self._blocks.items():
            block.attn.register_forward_pre_hook(partial(keep_joined, index), with_kwargs=True)

    @property
    def encoded(self) -> torch.Tensor:
        """Encoded patches [B * N, T, C]."""
        assert self._encoded is not None, 'the image encoder has run'
        return self._encoded

    def queries_keys(self, block: int, state: Any, views: int
                     ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [B, h, N, T, d] of a global block, whose state was ``state`` then."""
        attention, (x, positions) = self._blocks[block].attn, self._joined[block]
        if isinstance(attention, TttAttention):  # compares unit vectors
            sharp = attention.config.head_dim ** 0.5 / TEMPERATURE
            q = sharp * unit(attention.raw_queries(x), positions)
            k = unit(attention.raw_keys_values(x)[0], positions)
        else:
            q = attention.turned(attention.q_norm, attention.raw_queries(x), positions)
            k = state.keys
        return q.unflatten(2, (views, -1)), k.unflatten(2, (views, -1))


class AttentionInputs:
    """Queries and keys of some global blocks of the last forward pass."""

    def __init__(self, blocks: nn.ModuleList, chosen: Sequence[int]) -> None:
        """Hooks stay in the network as long as it lives."""
        self._inputs: dict[int, torch.Tensor] = {}
        self._attention = {index: cast(GlobalBlock, blocks[index]).attn for index in chosen}

        def keep(index: int, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._inputs[index] = inputs[0]
        for index, attention in self._attention.items():
            attention.register_forward_pre_hook(partial(keep, index))

    def queries_keys(self, block: int, views: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [B, h, N, P, d] as softmax compares them, without rotation."""
        attention, x = self._attention[block], self._inputs[block]
        q = attention.turned(attention.q_norm, attention.raw_queries(x), None)
        k = attention.turned(attention.k_norm, attention.raw_keys_values(x)[0], None)
        q = q * attention.config.head_dim ** -0.5
        return q.unflatten(2, (views, -1)), k.unflatten(2, (views, -1))
