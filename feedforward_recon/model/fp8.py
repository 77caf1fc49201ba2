"""Linear layers in eight-bit floating point (Lite3R, arXiv 2605.11354, FP8-aware training).

`FakeFp8Linear` computes in full precision with weights and inputs rounded to what E4M3 (one
sign, four exponent, three mantissa bits; largest value 448) can represent:
    Q(x) = cast(clamp(x / s, +-448)) * s,    s = max(amax, 1e-8) / 448,
amax per output row of the weight and per token of the input. The gradient passes straight
through (dQ/dx = 1), so a network can be trained to bear the rounding. Parameters are those of
`nn.Linear`, and state dicts are interchangeable.

`StoredFp8Linear` is what is deployed: one byte per weight and one scale per row, widened when
used. It saves memory, not arithmetic, and runs on any machine; inputs are not rounded.

Not used by the nodes or commands yet, except for `linear_rows`; for trainings and deployments of
your own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

E4M3_MAX = 448.0


def fake_quantise(x: torch.Tensor) -> torch.Tensor:
    """Values [..., n] rounded to E4M3 with one scale per row; the gradient is the identity."""
    with torch.no_grad():
        scale = _row_scale(x)
        error = _coded(x, scale).to(x.dtype) * scale - x
    return x + error


def _row_scale(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / E4M3_MAX


def _coded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


class FakeFp8Linear(nn.Linear):
    """`nn.Linear` with weights and inputs rounded to E4M3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.rows(x, slice(None))

    def rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """The outputs of some rows of the weight only."""
        bias = None if self.bias is None else self.bias[rows]
        return F.linear(fake_quantise(x), fake_quantise(self.weight[rows]), bias)


class StoredFp8Linear(nn.Module):
    """A linear layer whose weights are kept in E4M3.

    weight: float8_e4m3fn [out, in]; scale: float32 [out]; bias: [out] or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = _row_scale(weight)
        self.register_buffer('weight', _coded(weight, scale))
        self.register_buffer('scale', scale[:, 0])
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.rows(x, slice(None))

    def rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """The outputs of some rows of the weight only."""
        y = F.linear(x, self.weight[rows].to(x.dtype)) * self.scale[rows].to(x.dtype)
        return y if self.bias is None else y + self.bias[rows].to(x.dtype)


def linear_rows(linear: nn.Module, x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some outputs of a linear layer of any kind: x [..., in] -> [..., rows]."""
    if isinstance(linear, (FakeFp8Linear, StoredFp8Linear)):
        return linear.rows(x, rows)
    assert isinstance(linear, nn.Linear), type(linear)
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def fake_quantised(module: nn.Module) -> nn.Module:
    """Turn every `nn.Linear` inside ``module`` into a `FakeFp8Linear`; parameters are kept."""
    return _relabelled(module, nn.Linear, FakeFp8Linear)


def unquantised(module: nn.Module) -> nn.Module:
    """Undo `fake_quantised`."""
    return _relabelled(module, FakeFp8Linear, nn.Linear)


def stored_in_fp8(module: nn.Module) -> nn.Module:
    """Replace every linear layer inside ``module`` by a `StoredFp8Linear`; for inference."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, StoredFp8Linear(child))
    return module


def _relabelled(module: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> nn.Module:
    for part in module.modules():
        if type(part) is old:
            part.__class__ = new
    return module
