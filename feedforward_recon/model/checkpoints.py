"""Weights from files into networks, strictly."""

from __future__ import annotations

import torch
from torch import nn


def expected_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Official name and shape of every parameter and saved buffer of a network."""
    prefix = getattr(model, 'key_prefix', '')
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def put_tensor(model: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer with that official name by ``tensor``, without a copy."""
    path, _, name = key.removeprefix(getattr(model, 'key_prefix', '')).rpartition('.')
    module = model.get_submodule(path)
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        old = module._parameters[name]
        module._parameters[name] = nn.Parameter(tensor, old is not None and old.requires_grad)
