"""``reconstruct``: a whole recording at once - the online loop, then a second look.

Frames that the online loop could not place (before a monocular map had depth, or after losing
track) are looked up in the finished map, which has seen what came later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.mapping.mapper import Memory, OnlineReconstructor
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.model import Encoder
from feedforward_recon.types import Frame


def reconstruct(frames: Sequence[Frame], config: MapperConfig, encoder: Encoder,
                memory: Memory | None = None) -> SceneMap:
    """Map all frames, then place those that were missed; the second look writes nothing.

    Raises InputError for a frame that cannot be used.
    """
    mapper = OnlineReconstructor(config, encoder, memory)
    for frame in frames:
        mapper.process(frame)
    mapper.finish()
    second_look(mapper, frames)
    return mapper.scene_map()


def second_look(mapper: OnlineReconstructor, frames: Iterable[Frame]) -> int:
    """Place the frames that a finished mapper missed; ``frames`` are all, in the same order.

    Returns how many were found.
    """
    found = 0
    missed = {index for index, estimate in enumerate(mapper.estimates)
              if not estimate.status.has_pose}
    for index, frame in enumerate(frames if missed else ()):
        if index in missed:
            found += mapper.revisit(index, frame).status.has_pose
    return found
