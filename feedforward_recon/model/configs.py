"""Every architecture by name, in the sizes of the published checkpoints.

``build`` makes a network; under ``device='meta'`` it costs no memory, and
``checkpoints.load_weights`` then puts the weights of a file in its place without a copy.
"""

from __future__ import annotations

import dataclasses
import difflib

import torch
from torch import nn

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.backbone import BackboneConfig
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.network import Vggt, VggtConfig
from feedforward_recon.model.vit import VitConfig

Config = VggtConfig

CONFIGS: dict[str, Config] = {
    'vggt-1b': VggtConfig(),
    'vgg-t3': VggtConfig(BackboneConfig(VitConfig()), attention='ttt'),
    # Sizes of the reference outputs that every part is checked against.
    'vggt-small': VggtConfig(
        BackboneConfig(VitConfig(384, 6, 12, grid=5, mask_token=True), 4, (0, 1, 2, 3)),
        DptConfig(768, 64, (32, 64, 96, 128))),
    'tiny': VggtConfig(BackboneConfig(VitConfig(192, 3, 6, grid=16), 6, (1, 2, 4, 5)),
                       DptConfig(384, 64, (32, 64, 96, 128))),
}
ALIASES = {'vggt': 'vggt-1b'}


def config_of(name: str, attention: str | None = None) -> Config:
    """The configuration of a name, with another global attention if one is given.

    Raises ConfigError for a name that does not exist.
    """
    key = ALIASES.get(name, name)
    if key not in CONFIGS:
        near = difflib.get_close_matches(name, [*CONFIGS, *ALIASES], 1)
        hint = f'did you mean {near[0]}?' if near else f'choose one of {", ".join(CONFIGS)}'
        raise ConfigError(f'expected the name of a model, found {name!r}; {hint}')
    config = CONFIGS[key]
    return config if attention is None else dataclasses.replace(config, attention=attention)


def build(name: str, attention: str | None = None, device: str | torch.device = 'cpu',
          ) -> nn.Module:
    """A network in evaluation mode with initial weights (none on the device `meta`)."""
    config = config_of(name, attention)
    with torch.device(device):
        return Vggt(config, attention_factory(config.attention)).eval()


def attention_factory(name):
    from feedforward_recon.model.layers import Attention
    class Joint(Attention):
        def empty_state(self, batch):
            return None
        def forward(self, x, state, *, positions, frames, tokens_per_frame, write):
            return super().forward(x, positions), state
    return lambda config, index: Joint(config)
