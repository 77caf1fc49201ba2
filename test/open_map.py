"""Mapping into a map that a test holds, and can look at while it grows."""

from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.scene_map import Gauge, StartingMap


def open_map(config, encoder, camera):
    """An empty map, and the start that makes a mapper extend it: ``Mapper(.., start=start)``.

    Frames must have depth.
    """
    map_ = GrowingMap(config, encoder.dim)
    return map_, StartingMap(map_, Gauge(1.0, 'depth', 'first camera'), camera, sessions=0)
