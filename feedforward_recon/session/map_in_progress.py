"""``MapInProgress``: one map that is being made, and the jobs that save it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import MapError
from feedforward_recon.localization.network_localizer import SavedFastWeights
from feedforward_recon.localization.scene_network import NetworkMemory
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.scene_map import Draft, SceneMap, StartingMap
from feedforward_recon.mapping.sources import PoseSource
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.session.map_folder import (
    SavedMap,
    check_map_output,
    nothing_found,
    save_map,
)
from feedforward_recon.session.networks import dense_clouds
from feedforward_recon.types import FloatArray, Frame

SaveJob = Callable[[], SavedMap]
# Given the landmarks of the map [V, 3]; takes as long as a window of the network.
NetworkJob = Callable[[FloatArray], SavedFastWeights | None]


class LastSave:
    """The last save of one map: SHA-256 of its map.yaml, and how far the map was."""

    def __init__(self, sha256: str, progress: tuple[int, int]) -> None:
        self.sha256, self.progress = sha256, progress


class MapInProgress:
    """A mapper, the memory it writes, and the folder jobs that save both.

    metres_per_unit: what odometry says of a map without a scale of its own. network: the own
    memory of the network that maps. start: the saved map to go on with; sha256: of its map.yaml.
    """

    def __init__(self, config: MapperConfig, encoder: Encoder, writer: MemoryWriter,
                 source: PoseSource, *, network: NetworkMemory | None = None,
                 start: StartingMap | None = None, sha256: str = '') -> None:
        self.mapper = Mapper(config, encoder, writer, source=source, start=start,
                             dense=dense_clouds(config.cloud))
        self.metres_per_unit: float | None = None
        self._config, self._encoder, self._writer = config, encoder, writer
        self._network = network
        self._last_save = LastSave(sha256, self._progress)

    @property
    def scale(self) -> tuple[float | None, str]:
        """Metres per unit, None while unknown, and the source of that."""
        gauge = self.mapper.results.gauge
        if gauge.metres_per_unit is None and self.metres_per_unit is not None:
            return self.metres_per_unit, 'odometry'
        return gauge.metres_per_unit, gauge.scale_source

    @property
    def keyframes(self) -> int:
        """Keyframes so far."""
        return self.mapper.stats.keyframes

    @property
    def unsaved_keyframes(self) -> int:
        """Keyframes of a map that changed since it was saved; 0 when nothing would be lost."""
        return 0 if self._progress == self._last_save.progress else self.keyframes

    @property
    def _progress(self) -> tuple[int, int]:
        """Changes with the map; the frames between two keyframes do not count."""
        return self.mapper.stats.keyframes, self.mapper.stats.corrections

    def finished(self) -> SceneMap:
        """The map with everything done that can be; mapping may go on. Raises MapError."""
        scene = self.mapper.finish()
        if not scene.keyframes:
            raise no_map_yet()
        return scene

    def save(self, path: str | Path) -> SaveJob:
        """Finish the map; the job writes the folder, with copies of the memories.

        Raises MapError when there is no map yet, or when no frame was found in the map to go on
        with, InputError for an impossible path.
        """
        check_map_output(path)
        scene = self.finished()
        if scene.sessions > 1 and not len(scene.trajectory):
            raise nothing_found(Path(path), len(scene.estimates))
        return self._job(path, Draft(lambda: scene, []), self.network_job(scene))

    def network_job(self, scene: SceneMap) -> NetworkJob:
        """A job in which the network writes this map, from the images that are kept."""
        network, camera = self._network, scene.keyframes[-1].camera
        if network is None:
            return lambda _: None
        frames = [Frame(scene.estimates[number].stamp_ns, image, camera=camera)
                  for number, image in self.mapper.source.kept_images()]
        return lambda points: network.write(scene, frames, points, {f.stamp_ns for f in frames})

    def autosave(self, path: str | Path) -> SaveJob | None:
        """A job that writes the map as it stands, without the last refinement.

        It leaves out what the network would write, which may take longer than there is time.
        Taking it is quick. None while there is nothing that was not saved before.
        Raises InputError for an impossible path.
        """
        if not self.unsaved_keyframes:
            return None
        check_map_output(path)
        return self._job(path, self.mapper.results.draft())

    def _job(self, path: str | Path, draft: Draft, network: NetworkJob = lambda _: None
             ) -> SaveJob:
        state, progress, last = self._writer.state(), self._progress, self._last_save
        metres, config, encoder = self.metres_per_unit, self._config, self._encoder

        def job() -> SavedMap:
            made = draft.scene()
            if metres is not None and made.metres_per_unit is None:
                made = replace(made, metres_per_unit=metres, scale_source='odometry')
            copy = MemoryWriter.from_state(config.memory, state)
            for keyframe in draft.pending:
                copy.write(keyframe)
            written = network(copy.snapshot().points)
            saved = save_map(path, made, copy, encoder, config, written, replaces=last.sha256)
            last.sha256, last.progress = saved.sha256, progress
            return saved

        return job


def no_map_yet() -> MapError:
    """The error of whoever needs a map before there is one."""
    return MapError('expected a map, found none yet; move the camera through a textured place '
                    'first')
