"""``Backlog``: the work that a keyframe is followed by, in pieces of bounded cost.

refine the sliding window -> look for a loop -> calibrate, rarely -> write memory
a loop whose error shows -> pose graph -> bundle adjustment -> landmarks, piece by piece
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.mapping.adjustment import (
    calibrate_depth,
    refine_all,
    refine_window,
)
from feedforward_recon.mapping.association import associate_again, fuse_loop
from feedforward_recon.mapping.estimates import EstimateHistory
from feedforward_recon.mapping.feed import MemoryFeed
from feedforward_recon.mapping.loop_closure import Loop, close_loop, find_loop
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.preparation import Preparation
from feedforward_recon.mapping.scene_map import Stats
from feedforward_recon.mapping.skeleton import refine_skeleton

# Keyframes after which the whole map is refined, with what is open of the calibration. With fewer
# than six, parallax says little of it; doubling keeps the cost in proportion to the walk
# (docs/experiments.md, Poses while driving).
ROUNDS = tuple(6 * 2**i for i in range(12))
# What is left of the calibration error of a stereo pair spoils every step from the first on, so it
# is looked for as soon as there is parallax (docs/experiments.md, Stereo).
PAIR_ROUNDS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48)


class Backlog:
    """Work on the map that need not be done before the next frame is tracked.

    feed: on the way to the scene memory. What a keyframe is followed by goes before the pieces of
    a loop closure or of the refinement of the whole map.
    """

    def __init__(self, map_: GrowingMap, feed: MemoryFeed, history: EstimateHistory,
                 preparation: Preparation, stats: Stats) -> None:
        self.feed = feed
        self._map, self._history, self._preparation = map_, history, preparation
        self._stats = stats
        self._due: deque[Callable[[], object]] = deque()
        self._pieces: Iterator[None] | None = None

    @property
    def is_due(self) -> bool:
        """Work on the last keyframe is left (what comes in pieces is not counted)."""
        return bool(self._due)

    def clear(self) -> None:
        """The map was given up."""
        self._due.clear()
        self._pieces = None
        self.feed.restart()

    def follow_up(self, *, exact: bool, metric: bool) -> None:
        """A keyframe was added. exact: poses stay; metric: the map has its scale."""
        self._due.append(lambda: refine_window(self._map, self._map.config, poses_fixed=exact))
        if not exact:
            self._due.append(lambda: self._close_loops(with_scale=not metric))
            self._due.append(self._calibrate)
        self._due.append(lambda: self.feed.write(self._map))

    def work(self) -> bool:
        """One piece; False when nothing is left."""
        if not self._due and self._pieces is None:
            return False
        (self._due.popleft() if self._due else self._next_piece)()
        return True

    def refine_all(self, config: MapperConfig, calibration: tuple[str, ...] = (), *,
                   exact: bool = False) -> None:
        """Bundle adjustment of the whole map; what was written moves along.

        calibration: as in ``adjustment.refine_all``; the frames to come get the refined one.
        exact: poses stay.
        """
        shift = refine_all(self._map, config, calibration=calibration, poses_fixed=exact)
        calibrate_depth(self._map)
        self._preparation.adopt_calibration(self._map.keyframes[-1].camera, shift, calibration)
        self.feed.reanchor(self._map)

    def finish(self, settings: Sequence[MapperConfig], *, calibrate: bool, exact: bool) -> None:
        """The last refinements of the whole map, one for each of the settings.

        After the last of them landmarks are associated again, which it is good enough for after a
        few steps, and the map is refined once more. calibrate: with what is open of the
        calibration. exact: poses stay.
        """
        *first, last = settings
        calibration = self._open_calibration if calibrate else ()
        few, half = (replace(last, refine=replace(last.refine, global_steps=steps)) for steps in
                     (last.refine.loop_steps, last.refine.global_steps // 2 + 1))
        for config in (*first, few):
            self.refine_all(config, calibration, exact=exact)
        for _ in associate_again(self._map):
            pass  # no frame waits
        self.refine_all(half, calibration, exact=exact)

    def _close_loops(self, *, with_scale: bool) -> None:
        """Look for a loop of the newest keyframe; where the map is off, correct it."""
        newest, config = len(self._map) - 1, self._map.config
        if newest % config.loops.every or self._pieces is not None:
            return
        loop = find_loop(self._map, config, newest)
        if loop is None:
            return
        self._stats.loops += 1
        if loop.shift_px <= config.loops.correct_px:
            fuse_loop(self._map, newest, loop.features, loop.landmarks)
            return
        self.close(loop, with_scale=with_scale)

    def close(self, loop: Loop, *, with_scale: bool) -> None:
        """Correct the map around a loop, piece by piece (see ``close_loop``).

        with_scale: of a map without metric scale, whose scale drifts too.
        """
        self._stats.corrections += 1
        self._pieces = close_loop(self._map, self._map.config, loop, with_scale=with_scale,
                                   corrected=self._corrected)

    def _next_piece(self) -> None:
        if self._pieces is not None and next(self._pieces, self) is self:
            self._pieces = None

    def _corrected(self, scale: np.ndarray) -> None:
        self._history.rescale(scale)
        self.feed.reanchor(self._map)

    @property
    def _open_calibration(self) -> tuple[str, ...]:
        """What may be refined: the lens only while one made the map, not those of several."""
        newest = self._map.keyframes[-1].camera
        one_lens = all(keyframe.camera == newest for keyframe in self._map.keyframes)
        return tuple(name for name in self._preparation.open_calibration
                     if one_lens or name == 'shift')

    def _calibrate(self) -> None:
        """What is open of the calibration, and the trust in depth: early, and then rarely."""
        calibration = self._open_calibration
        rounds = PAIR_ROUNDS if 'shift' in calibration else ROUNDS
        if not (calibration or self._preparation.metric) or len(self._map) not in rounds:
            return
        if {'focal', 'shift'} & {*calibration}:  # they may be far off, and nothing is right then
            self.refine_all(self._map.config, calibration)
        elif self._pieces is None:
            self._pieces = self._refine_so_far(calibration)

    def _refine_so_far(self, calibration: tuple[str, ...]) -> Iterator[None]:
        """Look again for landmarks, and refine the whole map, in pieces."""
        def corrected(scale: np.ndarray) -> None:
            self._corrected(scale)
            # At once: the next frame is tracked in a map that is seen through this lens.
            self._preparation.adopt_calibration(self._map.keyframes[-1].camera, 0.0, calibration)

        yield from associate_again(self._map)
        yield from refine_skeleton(self._map, self._map.config, corrected, calibration)
        calibrate_depth(self._map)
