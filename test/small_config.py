"""Settings of maps that are made in seconds: a small memory.

OFFLINE: the same as parameters of a node that answers every image.
"""

from dataclasses import replace

from feedforward_recon.config.schema import MapperConfig

_BASE = MapperConfig()
SMALL = replace(_BASE, memory=replace(_BASE.memory, slots=8000, cells=2000, samples=20_000))
OFFLINE = {**{f'memory.{name}': getattr(SMALL.memory, name)
              for name in ('slots', 'cells', 'samples')},
           'tf_wait_s': 0.2, 'queue': 'offline'}
