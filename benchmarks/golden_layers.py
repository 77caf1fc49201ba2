"""Reference outputs of single layers: what ours say under the names of those files.

`benchmarks.golden` compares; each function here takes the arrays of a file, the rule that gives
parameters their values, and a dtype, and returns the same arrays as computed by this package.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from feedforward_recon.model.attention import fast_weights as fw
from feedforward_recon.model.attention.base import Layout
from feedforward_recon.model.attention.config import (
    AttentionConfig,
    SparseLinearOptions,
    SparseOptions,
)
from feedforward_recon.model.attention.registry import global_attention
from feedforward_recon.model.attention.sparse import SparseAttention
from feedforward_recon.model.fp8 import FakeFp8Linear

File = dict[str, np.ndarray]
Arrays = dict[str, torch.Tensor]
Rule = Callable[[str, tuple[int, ...]], np.ndarray]


def ttt_layer(file: File, rule: Rule, dtype: torch.dtype = torch.float32) -> Arrays:
    """Fast weights after one and two steps (`ttt_layer.npz`, which holds its own weights)."""
    del rule
    given = {name: torch.from_numpy(file[name]).to(dtype)
             for name in ('w0', 'w1', 'w2', 'q', 'k', 'v', 'lr0', 'lr1', 'lr2')}
    initial = weights = fw.FastWeights(given['w0'], given['w1'], given['w2'])
    samples = fw.KeyValueSamples(given['k'], given['v'],
                                 torch.stack((given['lr0'], given['lr1'], given['lr2'])))
    found: Arrays = {}
    for steps in (1, 2):
        weights = fw.advanced(weights, fw.summed_gradients(weights, [samples]), initial)
        found |= {f'{name}_steps{steps}': w for name, w in weights._asdict().items()}
        found[f'out_steps{steps}'] = fw.apply(weights, given['q'])
    return found


def sla_fp8(file: File, rule: Rule, dtype: torch.dtype = torch.float32) -> Arrays:
    """Lite3R's attention in its training form, and its eight-bit layer (`sla_fp8.npz`)."""
    x = torch.from_numpy(file['x']).to(dtype)
    options = SparseLinearOptions(keep_ratio=0.3)
    layer = global_attention(AttentionConfig(64, 4, 'sparse_linear', 0, sparse_linear=options))
    rounded = FakeFp8Linear(64, 48)
    for module, prefix in ((layer, 'sla.'), (rounded, 'fp8.')):
        filled(module, prefix, rule).to(dtype)
    out, _ = layer(x, layer.empty_state(1), positions=None, frames=1,
                   tokens_per_frame=x.shape[1], write=True)
    plain = nn.functional.linear(x, rounded.weight, rounded.bias)
    return {'sla_out': out, 'fp8_out': rounded(x), 'linear_out': plain}


def speed3r(file: File, rule: Rule, dtype: torch.dtype = torch.float64) -> Arrays:
    """Speed3R's layer on a large and on a tiny scene (`speed3r_reference.npz`)."""
    config = json.loads(str(file['config']))
    found: Arrays = {}
    for name, repeat, suffix in (('a', False, ''), ('b', False, '_clamped'),
                                 ('b', True, '_padded')):
        layer = _speed3r_layer(config, rule, repeat_last=repeat).to(dtype)
        generator = np.random.Generator(np.random.PCG64(config[name]['x_seed']))
        x = torch.from_numpy(generator.standard_normal(config[name]['x_shape'], np.float32))
        found |= {f'{name}_{key}{suffix if key in ("out", "o_sel", "topk_index") else ""}': value
                  for key, value in _speed3r_arrays(layer, x.to(dtype)[None],
                                                    config[name], file, name).items()}
    return {key: value for key, value in found.items() if key in file}


def _speed3r_layer(config: dict, rule: Rule, *, repeat_last: bool) -> SparseAttention:
    options = SparseOptions(kept=config['topk'], repeat_last=repeat_last)
    layer = SparseAttention(AttentionConfig(config['dim'], config['heads'], 'sparse', 0,
                                            sparse=options))
    filled(layer, 'speed3r.', rule)
    return layer


def _speed3r_arrays(layer: SparseAttention, x: torch.Tensor, case: dict, file: File,
                    name: str) -> Arrays:
    tokens = x.shape[1] // case['frames']
    positions = torch.from_numpy(file[f'{name}_pos'][:tokens]).long()
    out, state = layer(x, layer.empty_state(1), positions=positions, frames=case['frames'],
                       tokens_per_frame=tokens, write=True)
    blocks = layer.prepared(Layout(positions, tokens))
    coarse, exact, chosen = layer.branches(x, layer.readable(state), blocks)
    raw = layer.raw_queries(x)
    pooled = layer.turned(layer.q_norm, blocks.mean(blocks.split(raw)), blocks.positions)
    scores = (pooled @ layer.readable(state).blocks.pooled_keys.transpose(-1, -2))[0]
    count = len(blocks.order) * case['frames']
    gate = layer.gate(x).sigmoid().unflatten(-1, (-1, 2)).transpose(1, 2)
    assert blocks.positions is not None
    return {'out': out[0], 'o_comp': coarse[0].unflatten(1, (count, -1))[:, :, 0],
            'o_sel': exact[0], 'topk_index': chosen[0], 'gate': gate[0],
            'block_scores': scores,
            'block_pos': blocks.positions.repeat(case['frames'], 1)}


def filled(module: nn.Module, prefix: str, rule: Rule) -> nn.Module:
    """The module with every parameter given its values; single numbers stay as they are."""
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if tensor.ndim:
                tensor.copy_(torch.from_numpy(rule(prefix + key, tuple(tensor.shape))))
    return module


LAYERS: dict[str, Callable[..., Arrays]] = {
    'ttt': ttt_layer, 'sparse_linear': sla_fp8, 'sparse': speed3r}
