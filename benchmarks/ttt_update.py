"""How much of a GPU's peak the update of a `ttt` layer reaches.

Operations are counted from the formulas (`model/attention/fast_weights.py`), a multiplication
and an addition as two; element-wise work counts nothing, so the share says how much of the
time is not matrix products at full speed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.nn import functional as F

from feedforward_recon.model.attention import fast_weights
from feedforward_recon.model.attention.fast_weights import KeyValueSamples
from feedforward_recon.model.attention.ttt import TttAttention
from feedforward_recon.model.backbone import SPECIAL
from feedforward_recon.model.layers import GlobalBlock
from feedforward_recon.model.rope import patch_positions
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.model.vit import PATCH

# Dense bfloat16 TFLOP/s with float32 sums, by the makers' data sheets.
PEAK_TFLOPS = {'H200': 989.5, 'H100 PCIe': 756.0, 'H100': 989.5, 'GH200': 989.5, 'B200': 2250.0,
               'A100': 312.0, 'L40S': 362.0, 'RTX 4090': 165.2}
REPEATS = 5
LARGE = 8192


def update_row(network: Vggt, views: int, size_hw: tuple[int, int],
               compiled: bool = False) -> dict[str, Any]:
    """Time and rate of one layer's update and of the whole layer, for so many views."""
    block = cast(GlobalBlock, network.aggregator.global_blocks[0])
    layer, device = cast(TttAttention, block.attn), next(network.parameters()).device
    grid_hw = size_hw[0] // PATCH, size_hw[1] // PATCH
    tokens = SPECIAL + grid_hw[0] * grid_hw[1]
    plain = fast_weights.gradients
    if compiled:
        fast_weights.gradients = torch.compile(plain, dynamic=True)
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            update = _median_seconds(lambda: _update(layer, views, tokens), device)
            whole = _median_seconds(_layer_call(layer, views, grid_hw), device)
            large = _median_seconds(_large_product(device), device)
    finally:
        fast_weights.gradients = plain
    rates = {'update': update_flops(layer, views * tokens) / update / 1e12,
             'layer': layer_flops(layer, views * tokens) / whole / 1e12}
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if device.type == 'cuda'
                 and name in torch.cuda.get_device_name(device)), None)
    row = {'views': views, 'update_ms': 1e3 * update, 'layer_ms': 1e3 * whole}
    for name, tflops in rates.items():
        row |= {f'{name}_tflops': tflops, f'{name}_of_peak': tflops / peak if peak else None}
    size = LARGE if device.type == 'cuda' else LARGE // 16
    return {**row, 'product_tflops': 2 * size**3 / large / 1e12, 'peak_tflops': peak}


def update_flops(layer: TttAttention, tokens: int) -> float:
    """Operations of gradient sums (six products per token) and of the weights they give.

    A step is orthogonalised once for the next one and once when the finished state is read.
    """
    d, hidden = layer.config.head_dim, layer.config.ttt.hidden * layer.config.head_dim
    steps, products = layer.config.ttt.steps, 12 * d * hidden * tokens
    newton_schulz = 3 * layer.config.ttt.newton_schulz * (4 * d * d * hidden + 2 * d**3)
    return layer.config.heads * (steps * products + (2 * steps - 1) * newton_schulz)


def layer_flops(layer: TttAttention, tokens: int) -> float:
    """Operations of projections, rates, convolution, update and reading."""
    dim, heads, steps = layer.config.dim, layer.config.heads, layer.config.ttt.steps
    hidden = layer.config.ttt.hidden * layer.config.head_dim
    projected = 2 * dim * dim + steps * (4 * dim * dim + 6 * dim * heads + 18 * dim)
    reading = 2 * dim * dim + 6 * dim * hidden
    return (projected + reading) * tokens + update_flops(layer, tokens)


def _update(layer: TttAttention, views: int, tokens: int) -> Any:
    """Weights from ``views`` frames of random keys and values, chunk by chunk."""
    device, heads, d = layer.w0.device, layer.config.heads, layer.config.head_dim
    frames = min(views, layer.config.frames_per_chunk(tokens, device.type))
    shape = 1, heads, frames * tokens, d
    k = F.normalize(torch.randn(shape, device=device), dim=-1)
    v = torch.randn(shape, device=device).to(torch.bfloat16)
    rates = 0.01 * torch.rand(3, *shape[:3], 1, device=device)

    def samples() -> Iterator[KeyValueSamples]:
        for _ in range(math.ceil(views / frames)):
            yield KeyValueSamples(k, v, rates)
    return layer.readable(layer.learned(samples, layer.empty_state(1)))


def _layer_call(layer: TttAttention, views: int,
                grid_hw: tuple[int, int]) -> Callable[[], Any]:
    positions = patch_positions(grid_hw, SPECIAL, layer.w0.device)
    x = torch.randn(1, views * len(positions), layer.config.dim, device=layer.w0.device)
    return lambda: layer(x, layer.empty_state(1), positions=positions, frames=views,
                         tokens_per_frame=len(positions), write=True)


def _large_product(device: torch.device) -> Callable[[], Any]:
    """What the device reaches on one large product."""
    size = LARGE if device.type == 'cuda' else LARGE // 16
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def _median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median of some calls, after one that does not count."""
    call()
    found = []
    for _ in range(REPEATS):
        _synchronise(device)
        start = time.perf_counter()
        call()
        _synchronise(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _synchronise(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
