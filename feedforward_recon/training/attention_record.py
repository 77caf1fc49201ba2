"""What attentions are given and answer in a pass, to compare those of two networks."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from feedforward_recon.model.attention.base import QkvAttention
from feedforward_recon.model.layers import Attention


class Call(NamedTuple):
    """What an attention was given, by place and by name, and the tokens [B, T, C] it answered."""

    given: tuple[Any, ...]
    named: dict[str, Any]
    answer: torch.Tensor


class AttentionRecord:
    """Calls of some attentions of a network in its last pass, by their paths.

    Within images one is called for some images after the other.
    """

    def __init__(self, network: nn.Module, paths: Collection[str]) -> None:
        """Hooks stay in the network as long as it lives."""
        self._calls: dict[str, list[Call]] = {path: [] for path in paths}
        self._passing = False  # attentions may be called on their own, too
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end)
        for path in paths:
            network.get_submodule(path).register_forward_hook(
                partial(self._keep, path), with_kwargs=True)

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """The tokens [B, T, C] that each attention answered."""
        return {path: torch.cat([call.answer for call in calls])
                for path, calls in self._calls.items() if calls}

    def repeated(self, path: str, attention: nn.Module) -> torch.Tensor:
        """What another attention answers to what the one at ``path`` was given."""
        return torch.cat([_answer(attention, call) for call in self._calls[path]])

    def _begin(self, network: nn.Module, given: tuple[Any, ...]) -> None:
        del network, given
        self._passing = True
        for calls in self._calls.values():
            calls.clear()

    def _end(self, network: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        del network, given, answer
        self._passing = False

    def _keep(self, path: str, module: nn.Module, given: tuple[Any, ...],
              named: dict[str, Any], answer: Any) -> None:
        del module
        if self._passing:
            self._calls[path].append(Call(given, named, tokens_of(answer)))


def _answer(attention: nn.Module, call: Call) -> torch.Tensor:
    x, *others = call.given
    if 'frames' in call.named:  # joins frames: a scene that nothing was written to
        others[0] = attention.empty_state(len(x))  # type: ignore[operator]
    return tokens_of(attention(x, *others, **call.named))


def attention_paths(network: nn.Module) -> list[str]:
    """Where a network has attentions, joint ones and those within images."""
    return [path for path, module in network.named_modules()
            if isinstance(module, (QkvAttention, Attention))]


def tokens_of(answer: Any) -> torch.Tensor:
    """The tokens [B, T, C] of an attention's answer, which may have a state beside them."""
    return answer[0] if isinstance(answer, tuple) else answer


def unlikeness(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of tokens, as a share of the mean square of those wanted."""
    wanted = wanted.detach().float()
    return (said.float() - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)
