"""feedforward_recon: mapping and localisation with one camera.

    from feedforward_recon import load_map, map_frames, open_source

    run = map_frames(open_source('walk/'))    # into=load_map(...) goes on with a saved map
    run.save('maps/kitchen')
    localizer = load_map('maps/kitchen').localizer()
    estimate = localizer.localize(next(iter(open_source('query.jpg'))))

The names below are loaded when they are first used, so that importing the package is quick.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from feedforward_recon.version import __version__

if TYPE_CHECKING:
    from feedforward_recon.config.schema import MapperConfig
    from feedforward_recon.io import open_source
    from feedforward_recon.localization.localizer import Localizer
    from feedforward_recon.mapping.mapper import Mapper
    from feedforward_recon.memory import MemoryWriter, SceneMemory
    from feedforward_recon.model.compact import CompactEncoder
    from feedforward_recon.session.map_folder import load_map, save_map
    from feedforward_recon.session.offline import map_frames
    from feedforward_recon.types import Estimate, Frame

__all__ = ['CompactEncoder', 'Estimate', 'Frame', 'Localizer', 'Mapper', 'MapperConfig',
           'MemoryWriter', 'SceneMemory', '__version__', 'load_map', 'map_frames',
           'open_source', 'save_map']

logging.getLogger(__name__).addHandler(logging.NullHandler())
_HOMES = {'CompactEncoder': 'model.compact', 'Estimate': 'types', 'Frame': 'types',
          'Localizer': 'localization.localizer', 'Mapper': 'mapping.mapper',
          'MapperConfig': 'config.schema', 'MemoryWriter': 'memory', 'SceneMemory': 'memory',
          'load_map': 'session.map_folder', 'map_frames': 'session.offline',
          'open_source': 'io', 'save_map': 'session.map_folder'}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
