"""The exponential moving average of weights: smoother than any of them (Polyak 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

DECAY = 0.998


class MovingAverage:
    """Averages of all floating-point tensors of a network."""

    def __init__(self, network: nn.Module) -> None:
        self._mean = {name: tensor.detach().clone()
                      for name, tensor in network.state_dict().items()
                      if tensor.is_floating_point()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after a step; early ones are forgotten sooner."""
        share = 1 - min(DECAY, (step + 2) / (step + 11))
        for name, tensor in network.state_dict().items():
            if name in self._mean:
                self._mean[name].lerp_(tensor, share)

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Within this context the network has the averages as its weights."""
        own = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(self._mean, strict=False)
        try:
            yield
        finally:
            network.load_state_dict(own)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by name."""
        return self._mean

    def load_state_dict(self, mean: Mapping[str, torch.Tensor]) -> None:
        """What ``state_dict`` gave."""
        self._mean = dict(mean)
