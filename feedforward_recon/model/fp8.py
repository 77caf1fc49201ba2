"""Linear layers in eight-bit floating point (Lite3R, arXiv 2605.11354, FP8-aware training).

`FakeFp8Linear` computes in full precision with weights and inputs rounded to what E4M3 (one
sign, four exponent, three mantissa bits; largest value 448) can represent:
    Q(x) = cast(clamp(x / s, +-448)) * s,    s = max(amax, 1e-8) / 448,
amax per output row of the weight and per token of the input. The gradient passes straight
through (dQ/dx = 1), so a network can be trained to bear the rounding. Parameters are those of
`nn.Linear`, and state dicts are interchangeable.

`StoredFp8Linear`, `StoredFp8Conv` and `StoredFp8Matrices` are what is deployed (``--precision
fp8``): one byte per weight and one scale per output channel; biases, norms, tokens and other
vectors stay as they are. Weights are widened for each product, which runs on any machine and
saves memory alone. Where a GPU multiplies E4M3 (`multiplies_fp8`), linear layers that compute in
bfloat16 multiply them as they are, with inputs rounded per token as in `FakeFp8Linear`; sizes
that the units do not take, convolutions and what computes in float32, as most heads do, are
widened there too.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

E4M3_MAX = 448.0
PRECISIONS = ('full', 'fp8')  # of weights: float32, E4M3
UNIT_SIDE = 16  # FP8 units take matrices whose sides are multiples of this
FP8_CAPABILITY = (8, 9)  # compute capability of the first GPUs that multiply E4M3


def fake_quantise(x: torch.Tensor) -> torch.Tensor:
    """Values [..., n] rounded to E4M3 with one scale per row; the gradient is the identity."""
    with torch.no_grad():
        scale = _row_scale(x)
        error = _coded(x, scale).to(x.dtype) * scale - x
    return x + error


def _row_scale(x: torch.Tensor) -> torch.Tensor:
    return _scale_to(x.abs().amax(-1, keepdim=True))


def _scale_to(largest: torch.Tensor) -> torch.Tensor:
    return largest.clamp(min=1e-8) / E4M3_MAX


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
        self.register_buffer('weight', None)
        self.register_buffer('scale', None)
        self.keep(linear.weight)
        self.bias = linear.bias

    def keep(self, weight: torch.Tensor) -> None:
        """Take other weights [out, in], of any precision."""
        self.weight, self.scale = stored_weights(weight, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.rows(x, slice(None))

    def rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """The outputs of some rows of the weight only."""
        weight, scale = self.weight[rows], self.scale[rows]
        bias = None if self.bias is None else self.bias[rows].to(x.dtype)
        if multiplies_fp8(x.device) and _in_bfloat16(x) and _fits_units(weight):
            y = fp8_product(x, weight, scale)
            return y if bias is None else y + bias.to(y.dtype)
        return F.linear(x, _widened(weight, scale[:, None], x.dtype), bias)


class StoredFp8Conv(nn.Module):
    """A convolution of maps, transposed or not, whose weights are kept in E4M3.

    weight: float8_e4m3fn, shaped as that of the convolution; scale: float32 [out]; bias: [out]
    or None. Transposed ones keep their outputs in the second dimension, and have one group.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.register_buffer('weight', None)
        self.register_buffer('scale', None)
        self.transposed = isinstance(conv, nn.ConvTranspose2d)
        assert conv.padding_mode == 'zeros' and (conv.groups == 1 or not self.transposed)
        self._shape = {name: getattr(conv, name) for name in (
            'stride', 'padding', 'dilation', 'groups',
            *(['output_padding'] if self.transposed else []))}
        self.keep(conv.weight)
        self.bias = conv.bias

    def keep(self, weight: torch.Tensor) -> None:
        """Take other weights of the same shape, of any precision."""
        self.weight, self.scale = stored_weights(weight, int(self.transposed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, in, H, W] -> [B, out, h, w]."""
        scale = self.scale[:, None, None]
        weight = _widened(self.weight, scale if self.transposed else scale[:, None], x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product = F.conv_transpose2d if self.transposed else F.conv2d
        return product(x, weight, bias, **self._shape)


class StoredFp8Matrices(nn.Module):
    """Matrices [..., in, out] kept in E4M3; called, they are float32 again.

    For tensors that a module names in ``fp8_matrices`` and multiplies by itself.
    weight: float8_e4m3fn [..., in, out]; scale: float32 [out].
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, matrices: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer('weight', None)
        self.register_buffer('scale', None)
        self.keep(matrices)

    def keep(self, weight: torch.Tensor) -> None:
        """Take other matrices of the same shape, of any precision."""
        self.weight, self.scale = stored_weights(weight, weight.ndim - 1)

    def forward(self) -> torch.Tensor:
        """The matrices [..., in, out], float32."""
        return _widened(self.weight, self.scale, torch.float32)


Stored = StoredFp8Linear | StoredFp8Conv | StoredFp8Matrices


def widened_matrices(kept: torch.Tensor | nn.Module) -> torch.Tensor:
    """Matrices of a module, whether they are kept in E4M3 or as they are."""
    return kept if isinstance(kept, torch.Tensor) else kept()


def stored_weights(weight: torch.Tensor, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in E4M3, of the same shape, and the scale float32 [out] of each output channel.

    outputs: the dimension of the output channels.
    """
    weight = weight.detach().float()
    others = [dim for dim in range(weight.ndim) if dim != outputs]
    scale = _scale_to(weight.abs().amax(others, keepdim=True))
    return _coded(weight, scale), scale.flatten()


def _widened(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.float16:  # has no room for the scales of small weights
        return weight.float().mul_(scale).to(dtype)
    return weight.to(dtype).mul_(scale.to(dtype))


# -- products of numbers in E4M3 -----------------------------------------------------------


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """True for a GPU that multiplies E4M3 with a scale per row, with the PyTorch that is there."""
    if device.type != 'cuda' or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return False
    try:  # the first versions with FP8 have one scale for all rows only, or none for this GPU
        fp8_product(torch.ones(UNIT_SIDE, UNIT_SIDE, device=device),
                    *stored_weights(torch.ones(UNIT_SIDE, UNIT_SIDE, device=device), 0))
    except (RuntimeError, TypeError):
        return False
    return True


def fp8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inputs [..., in], rounded to E4M3 per token, times weights: bfloat16 [..., out].

    weight: float8_e4m3fn [out, in]; scale: float32 [out].
    """
    tokens = x.reshape(-1, x.shape[-1])
    per_token = _scale_to(tokens.abs().amax(-1, keepdim=True).float())
    y = torch._scaled_mm(_coded(tokens, per_token), weight.t(), scale_a=per_token,
                         scale_b=scale[None], out_dtype=torch.bfloat16)
    return y.unflatten(0, x.shape[:-1])


def _in_bfloat16(x: torch.Tensor) -> bool:
    """Whether a product with x is one of bfloat16, by itself or by autocast."""
    kind = x.device.type
    return x.dtype is torch.bfloat16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16)


def _fits_units(weight: torch.Tensor) -> bool:
    return not any(side % UNIT_SIDE for side in weight.shape)


# -- whole networks ------------------------------------------------------------------------


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
    """Replace linear layers, convolutions and `fp8_matrices` inside by their stored forms.

    One after the other, so that no more than one layer exists twice; for inference.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, StoredFp8Linear(child))
            elif isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)):
                setattr(parent, name, StoredFp8Conv(child))
        for name in getattr(parent, 'fp8_matrices', ()):
            matrices = getattr(parent, name)
            delattr(parent, name)
            setattr(parent, name, StoredFp8Matrices(matrices))
    return module


def precision_of(network: nn.Module) -> str:
    """How the weights of a network are kept: one of `PRECISIONS`."""
    stored = any(isinstance(part, Stored) for part in network.modules())
    return PRECISIONS[stored]


def network_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once; also of one on `meta`."""
    return sum(tensor.numel() * tensor.element_size()
               for tensor in (*network.parameters(), *network.buffers()))


def storage_note(device: torch.device) -> str:
    """What becomes of weights in E4M3 on a device, in a sentence."""
    if multiplies_fp8(device):
        return (f'weights are kept in fp8, and {device} multiplies them as they are where the '
                'network computes in bfloat16')
    return f'weights are kept in fp8 and widened for each product: {device} has no FP8 units'


def _relabelled(module: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> nn.Module:
    for part in module.modules():
        if type(part) is old:
            part.__class__ = new
    return module
