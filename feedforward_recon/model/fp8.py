"""Linear layers in eight-bit floating point (Lite3R, arXiv 2605.11354, FP8-aware training).

`FakeFp8Linear` computes in full precision with weights and inputs rounded to what E4M3 (one
sign, four exponent, three mantissa bits; largest value 448) can represent:
    Q(x) = cast(clamp(x / s, +-448)) * s,    s = max(amax, 1e-8) / 448,
amax per output row of the weight and per token of the input. The gradient passes straight
through (dQ/dx = 1), so a network can be trained to bear the rounding. Parameters are those of
`nn.Linear`, and state dicts are interchangeable.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

E4M3_MAX = 448.0


def fake_quantise(x: torch.Tensor) -> torch.Tensor:
    """Values [..., n] rounded to E4M3 with one scale per row; the gradient is the identity."""
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / E4M3_MAX
        coded = (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        error = coded.to(x.dtype) * scale - x
    return x + error


class FakeFp8Linear(nn.Linear):
    """`nn.Linear` with weights and inputs rounded to E4M3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.rows(x, slice(None))

    def rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """The outputs of some rows of the weight only."""
        bias = None if self.bias is None else self.bias[rows]
        return F.linear(fake_quantise(x), fake_quantise(self.weight[rows]), bias)


def linear_rows(linear: nn.Linear, x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some outputs of a linear layer: x [..., in] -> [..., rows]."""
    if isinstance(linear, FakeFp8Linear):
        return linear.rows(x, rows)
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def fake_quantised(module: nn.Module) -> nn.Module:
    """Turn every `nn.Linear` inside ``module`` into a `FakeFp8Linear`; parameters are kept."""
    return _relabelled(module, nn.Linear, FakeFp8Linear)


def full_precision(module: nn.Module) -> nn.Module:
    """Undo `fake_quantised`."""
    return _relabelled(module, FakeFp8Linear, nn.Linear)


def _relabelled(module: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> nn.Module:
    for part in module.modules():
        if type(part) is old:
            part.__class__ = new
    return module
