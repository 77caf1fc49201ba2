"""What the guiding losses of the transformer look at inside a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import nn

from feedforward_recon.model.layers import GlobalBlock


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
