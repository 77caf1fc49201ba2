"""The coordinate network: a descriptor in, the point of the map it belongs to out.

A residual MLP fitted at test time (scene coordinate regression in the manner of ACE, Brachmann
et al. 2023, on our own descriptors). It also says how far off it expects to be, in pixels,
so that the localizer can take its best answers first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

LOG_SIGMA_RANGE = (-2.0, 7.0)  # of an error in pixels: 0.14 to 1100, all that an image can show


class CoordinateNetwork(nn.Module):
    """Descriptors [N, D] -> points [N, 3] in units of ``box_size`` and log sigma [N] (px)."""

    def __init__(self, dim: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.entry = nn.Linear(dim, hidden)
        self.blocks = nn.ModuleList([
            nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
            for _ in range(blocks)])
        self.exit = nn.Linear(hidden, 4)

    def forward(self, descriptors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map descriptors [N, D] to (points [N, 3], log sigma [N])."""
        x = self.entry(descriptors)
        for block in self.blocks:
            x = x + block(F.relu(x))
        out = self.exit(F.relu(x).float())
        return out[:, :3], out[:, 3].clamp(*LOG_SIGMA_RANGE)


def initial_network(dim: int, hidden: int, blocks: int, seed: int) -> CoordinateNetwork:
    """A network with the random weights of a seed, drawn as PyTorch draws those of `nn.Linear`.

    The global generator is not used, so nobody else's random numbers depend on it.
    """
    network = _without_weights(dim, hidden, blocks).to_empty(device='cpu')
    generator = torch.Generator().manual_seed(seed)
    gain = nn.init.calculate_gain('leaky_relu', math.sqrt(5))
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            bound = math.sqrt(3.0) * (gain / math.sqrt(layer.in_features))
            layer.weight.data.uniform_(-bound, bound, generator=generator)
            bound = 1 / math.sqrt(layer.in_features)
            layer.bias.data.uniform_(-bound, bound, generator=generator)
    return network


def network_from(tensors: Mapping[str, torch.Tensor]) -> CoordinateNetwork:
    """The network with these weights, for reading."""
    hidden, dim = tensors['entry.weight'].shape
    blocks = sum(name.endswith('.0.weight') for name in tensors)
    network = _without_weights(dim, hidden, blocks)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()},
                            assign=True)
    return network.eval()


def _without_weights(dim: int, hidden: int, blocks: int) -> CoordinateNetwork:
    with torch.device('meta'):
        return CoordinateNetwork(dim, hidden, blocks)
