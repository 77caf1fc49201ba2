"""``MemoryFeed``: keyframes on their way into the scene memory."""

from __future__ import annotations

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.mapping.keyframes import KeyframePacker
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.scene_map import Memory

# Newest keyframes that wait: refining the window moves older ones by little, and a camera that was
# just switched on is to be localised soon. What they gain later is corrected by ``finish``.
WAITING = 6


class MemoryFeed:
    """Writes each keyframe once, when it hardly moves any more, and packs what is written."""

    def __init__(self, memory: Memory | None, config: MapperConfig, written: int = 0) -> None:
        self._memory, self._config = memory, config
        self._packer = KeyframePacker(config.cloud)
        self.written = written

    def restart(self) -> None:
        """The map was given up before anything of it was written."""
        self._packer, self.written = KeyframePacker(self._config.cloud), 0

    def write(self, map_: GrowingMap, *, everything: bool = False) -> None:
        """Hand keyframes to the memory once ``WAITING`` newer ones are there."""
        waiting = min(WAITING, self._config.refine.window)
        done = len(map_) - (0 if everything else waiting)
        for id_ in range(self.written, done):
            if self._memory is not None:
                self._memory.write(map_.exported(id_))
        self.written = max(self.written, done)
        self._packer.pack(map_.keyframes, self.written - self._config.refine.window)

    def finish(self, map_: GrowingMap) -> None:
        """Write the rest, and correct what was written before the map was refined."""
        if self._memory is not None:
            for id_ in range(self.written):
                self._memory.correct(map_.exported(id_))
        self.write(map_, everything=True)

    def reanchor(self, map_: GrowingMap) -> None:
        """Keyframes have moved; what was written moves along."""
        if self._memory is not None and self.written:
            self._memory.reanchor(dict(enumerate(map_.T_map_cam[:self.written].copy())))
