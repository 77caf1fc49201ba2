"""The variants of global attention by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.base import QkvAttention
from feedforward_recon.model.attention.config import AttentionConfig, SparseLinearOptions
from feedforward_recon.model.attention.hybrid import HybridAttention
from feedforward_recon.model.attention.latent import LatentAttention
from feedforward_recon.model.attention.softmax import SoftmaxAttention
from feedforward_recon.model.attention.sparse import SparseAttention
from feedforward_recon.model.attention.sparse_linear import (
    LocalSparseLinear,
    SparseLinearAttention,
)
from feedforward_recon.model.attention.ttt import TttAttention
from feedforward_recon.model.layers import BlockConfig

ATTENTION: dict[str, type[QkvAttention]] = {
    'softmax': SoftmaxAttention,
    'ttt': TttAttention,
    'sparse': SparseAttention,
    'sparse_linear': SparseLinearAttention,
    'lite3r': SparseLinearAttention,
    'latent': LatentAttention,
    'hybrid': HybridAttention,
}
# `lite3r` is `sparse_linear` in the form that Lite3R's weights were trained in: each token keeps
# this share of all tokens.
LITE3R_KEEP_RATIO = 0.3


def global_attention(config: AttentionConfig, layer_index: int = 0) -> QkvAttention:
    """The attention that ``config.name`` says; layer_index makes initial fast weights differ.

    Raises ConfigError, with the nearest name, for one that does not exist.
    """
    if config.name not in ATTENTION:
        near = difflib.get_close_matches(config.name, ATTENTION, 1)
        hint = f'did you mean {near[0]}?' if near else f'choose one of {", ".join(ATTENTION)}'
        raise ConfigError(f'expected the name of an attention, found {config.name!r}; {hint}')
    config = replace(config, sparse_linear=what_is_kept(config.name, config.sparse_linear))
    return ATTENTION[config.name](config, layer_index)


def what_is_kept(name: str, given: SparseLinearOptions) -> SparseLinearOptions:
    """The options of `sparse_linear`, and of its form `lite3r`, which keeps a share of tokens."""
    if name == 'lite3r' and given.keep_ratio is None:
        return replace(given, keep_ratio=LITE3R_KEEP_RATIO)
    return given


def joint_attentions(network: nn.Module) -> list[QkvAttention]:
    """Those in which views meet."""
    return [layer for layer in network.modules()
            if isinstance(layer, QkvAttention) and not isinstance(layer, LocalSparseLinear)]


def attention_factory(name: str, **options: Any) -> Callable[[BlockConfig, int], QkvAttention]:
    """A function (block, layer index) -> attention, for building a backbone.

    options: further fields of `AttentionConfig`.
    """
    def make(block: BlockConfig, layer_index: int) -> QkvAttention:
        config = AttentionConfig(block.dim, block.heads, name, qk_norm=block.qk_norm,
                                 round_qk=block.round_qk, one_place=block.one_place, **options)
        return global_attention(config, layer_index)
    return make
