"""Settings of maps that are made in seconds: a small memory, hardly polished.

OFFLINE: the same as parameters of a node that answers every image.
"""

from dataclasses import replace

from feedforward_recon.config.schema import MapperConfig

_BASE = MapperConfig()
SMALL = replace(_BASE, memory=replace(_BASE.memory, polish_steps=20, slots=8000,
                                      reservoir=20_000, hidden_dim=64))
OFFLINE = {**{f'memory.{name}': getattr(SMALL.memory, name) for name in
              ('polish_steps', 'slots', 'reservoir', 'hidden_dim')},
           'tf_wait_s': 0.2, 'queue': 'offline'}
