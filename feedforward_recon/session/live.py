"""``LiveSession``: mapping and localisation for a running robot, whatever brings the images.

    frames -> process -> Estimate      mapping: track, extend the map, write the memory
                                       localization: follow the camera in a frozen memory
              locate                   one image against the memory; never writes
              save, load, reset, set_localization

One thread calls it. Work that may take seconds and needs no part of the live state (writing a
folder, fusing a cloud) comes back as a job for another thread.
A call that fails leaves the session as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import InputError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.localization.network_localizer import NetworkLocalizer
from feedforward_recon.mapping.cloud import CloudSource
from feedforward_recon.mapping.scene_map import StartingMap
from feedforward_recon.mapping.sources import FeaturePoses, PoseSource
from feedforward_recon.mapping.sources.windows import WindowPoses
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.map_folder import SavedMap, is_map, load_map, settings_to_go_on
from feedforward_recon.session.map_in_progress import MapInProgress, SaveJob, no_map_yet
from feedforward_recon.session.networks import (
    NetworkInUse,
    SessionNetwork,
    dense_clouds,
    load_network,
)
from feedforward_recon.session.newest_memory import NO_MAP, NewestMemory, no_map
from feedforward_recon.session.stream import LocalizedStream, with_camera
from feedforward_recon.types import Estimate, Frame, Trajectory

__all__ = ['NO_MAP', 'LiveSession', 'Mode', 'SessionInfo', 'session_of']
Mode = Literal['mapping', 'localization']
# A map of fewer, some seconds of a walk, is restarted rather than kept with a guessed camera;
# chosen by hand.
YOUNG_KEYFRAMES = 20


@dataclass(frozen=True)
class SessionInfo:
    """Where a session stands.

    keyframes: of the map that is being made; memory_bytes: of the memory, saved or not.
    metres_per_unit: None while the scale is unknown. frame, scale_source and camera_source as in
    ``SceneMap``. window: what the window of a feed-forward network waits for, '' without.
    unsaved_keyframes: of a map that changed since it was saved, 0 when nothing would be lost.
    is_busy: a network is at work on a thread of its own. asked: what single images are looked for
    with: 'landmarks', 'network', or 'network, landmarks decide'.
    """

    mode: Mode
    has_map: bool
    keyframes: int
    memory_bytes: int
    metres_per_unit: float | None
    scale_source: str
    camera_source: str
    frame: str
    window: str = ''
    unsaved_keyframes: int = 0
    is_busy: bool = False
    asked: str = 'landmarks'


def session_of(config: NodeConfig, on_ready: Callable[[], None] = lambda: None) -> LiveSession:
    """The session that the settings of a node describe, with its networks and its map.

    Raises ConfigError, CheckpointError or MapError for what cannot be used.
    """
    config.check()
    session = LiveSession(config.mapper, CompactEncoder.load(config=config.encoder), config.mode,
                          load_network=partial(load_network, config) if config.feeds_forward
                          else None, localize_with=config.localize_with, on_ready=on_ready)
    if config.mode == 'localization' and config.map:
        session.load(config.map)
    elif config.map and not config.fresh and is_map(config.map):
        session.load(config.map, extend=True)
    return session


class LiveSession:
    """A map that is being made, or one that was loaded, and the mode it is used in.

    load_network: brings the feed-forward network that maps, once it is needed; None maps with the
    encoder alone. localize_with: what single images are looked for with (see ``NetworkInUse``).
    on_ready: called on another thread when ``work`` has something to do.
    Raises what load_network raises.
    """

    def __init__(self, config: MapperConfig, encoder: Encoder, mode: Mode = 'mapping', *,
                 load_network: Callable[[], SessionNetwork] | None = None,
                 localize_with: str = 'auto', on_ready: Callable[[], None] = lambda: None
                 ) -> None:
        self.config = config
        self.encoder = encoder
        self.mode: Mode = mode
        self.on_ready = on_ready
        self._network = NetworkInUse(load_network, localize_with)
        if mode == 'mapping':  # what takes a second is loaded now, not with the first image
            self._network.loaded()
            dense_clouds(config.cloud)
        self._memory_bytes = MemoryWriter(config.memory, encoder.dim).snapshot().nbytes
        self._map: MapInProgress | None = None
        self._newest: NewestMemory | None = None  # of the map that is being made
        self._loaded: tuple[SavedMap, Localizer] | None = None
        self._asked: NetworkLocalizer | None = None  # of a frozen map
        self._stream = LocalizedStream(config.tracking)

    def configure(self, config: MapperConfig) -> None:
        """Take over settings of the localizer that changed while running."""
        self.config = replace(self.config, localizer=config.localizer)
        if self._newest is not None:
            self._newest.configure(config.localizer)
        if self._loaded is not None:
            saved, old = self._loaded
            self._loaded = saved, Localizer(old.memory, self.encoder, config.localizer,
                                            old.camera)
        if self._asked is not None and self._asked.refiner is not None:
            self._asked.refiner = self._localizer()

    # -- images ----------------------------------------------------------------------------

    def process(self, frame: Frame, T_map_first: np.ndarray | None = None, *,
                finish_work: bool = True,
                on_pose: Callable[[Estimate], None] | None = None) -> Estimate:
        """One frame of the stream, in the present mode.

        T_map_first: pose of the camera if this frame starts a map (see PoseSource).
        finish_work: do at once all that ``work`` would do between frames (the backlog of a
        keyframe, a check against the memory). Else on_pose is called with the pose of a tracked
        frame before the frame becomes a keyframe.
        Raises InputError for an image that cannot be used.
        """
        if self.mode == 'localization':
            estimate = self._stream.process(frame, self._localizer())
            while finish_work and self._stream.work():
                pass
            return estimate
        if self._map is None:
            self._map = self._begin(MemoryWriter(self.config.memory, self.encoder.dim))
        mapper = self._map.mapper
        if T_map_first is not None and not mapper.stats.keyframes:
            mapper.source.T_map_first = T_map_first
        return mapper.process(frame) if finish_work else mapper.track(frame, on_pose)

    def _begin(self, writer: MemoryWriter, start: StartingMap | None = None, sha256: str = ''
               ) -> MapInProgress:
        """A new map, or one that goes on from ``start``; sha256: of the map.yaml of that one."""
        self._newest = NewestMemory(writer, self.encoder, self.config.localizer,
                                    hint=lambda: self._stream.hint)
        network = self._network.loaded()
        source = _pose_source(self.config, self.encoder, network, self._newest,
                              on_ready=lambda: self.on_ready())
        return MapInProgress(self.config, self.encoder, writer, source, start=start, sha256=sha256,
                             network=None if network is None else network.memory)

    def work(self) -> bool:
        """One piece of the backlog that ``process`` left; False when nothing is left."""
        if self.mode == 'localization':
            return self._stream.work()
        return self._map is not None and self._map.mapper.work()

    def late(self) -> list[Estimate]:
        """Poses of earlier frames that ``process``, ``work`` or ``save`` brought meanwhile."""
        return [] if self._map is None else self._map.mapper.source.late()

    def locate(self, frame: Frame) -> Estimate:
        """Find one image in the memory; nothing is written.

        Raises InputError when the image comes without a camera and the map knows none for it.
        """
        localizer = self._localizer()
        if localizer is None:
            return no_map(frame)
        if self._asked is not None:
            return self._asked.localize(frame)
        return localizer.localize(with_camera(frame, localizer.camera))

    def hint(self, T_map_cam: np.ndarray) -> None:
        """A prior pose T_map_cam [4, 4], map units: tried first, and checked like any other."""
        self._stream.hint = T_map_cam
        self._stream.forget()

    def _localizer(self) -> Localizer | None:
        """A localizer on the loaded or on the newest frozen memory; None without a map."""
        if self._loaded is not None:
            return self._loaded[1]
        if self._newest is None or self._map is None:
            return None
        return self._newest.localizer(self._map.mapper.results.camera)

    # -- the map ---------------------------------------------------------------------------

    def save(self, path: str | Path) -> SaveJob:
        """Finish the map; the job writes the folder, with a copy of the memory.

        The job raises InputError or MapError when the folder cannot be written. Raises MapError
        when there is no map of our own to save, InputError for an impossible path.
        """
        if not str(path):
            raise InputError("expected a folder in the parameter 'map', found ''; set it")
        if self._loaded is not None:
            raise MapError(f'expected a map made here, found the one loaded from '
                           f'{self._loaded[0].path}, which is saved already')
        if self._map is None:
            raise no_map_yet()
        return self._map.save(path)

    def autosave(self, path: str | Path) -> SaveJob | None:
        """A job that writes the map as it stands; None while nothing is unsaved.

        Raises InputError for an impossible path.
        """
        return None if self._map is None else self._map.autosave(path)

    def load(self, path: str | Path, *, extend: bool = False) -> SavedMap:
        """Localise in a saved map from now on; the map that was being made is dropped.

        extend: go on mapping into it, once a frame was found there; until then, and beside
        mapping, images are localised in it.
        Raises MapError, and keeps everything, when the folder cannot be used.
        """
        if not str(path):
            raise MapError("expected a map folder in the parameter 'map', found ''; set it")
        saved = load_map(path)
        encoder = saved.load_encoder()
        if not extend:
            localizer = Localizer(saved.memory, encoder, self.config.localizer, saved.info.camera)
            written = saved.fast_weights() if self._network.asks else None
            asked = self._network.localizer(written, localizer, str(saved.path))
            self._clear()
            self.mode, self.encoder, self._loaded = 'localization', encoder, (saved, localizer)
            self._asked = asked
            return saved
        if self._network.maps:
            raise MapError(f'{saved.path}: expected model compact to go on with a map, found a '
                           'feed-forward network; choose model compact, or start a new map')
        config = settings_to_go_on(saved, self.config)
        start, writer = saved.start(config, encoder)
        self._clear()
        self.mode, self.encoder, self.config = 'mapping', encoder, config
        self._memory_bytes = saved.memory.nbytes
        self._map = self._begin(writer, start, saved.sha256)
        return saved

    def reset(self) -> str:
        """Forget the map that is being made, or in a loaded one where the camera was."""
        if self._loaded is not None:
            self._stream.hint = None
            self._stream.forget()
            return f'forgot the last pose; the map loaded from {self._loaded[0].path} stays'
        keyframes = self.info.keyframes
        self._clear()
        return f'forgot the map of {keyframes} keyframes'

    def set_localization(self, on: bool) -> str:
        """Freeze the map and localise in it, or go on mapping.

        Raises MapError where that makes no sense, and what loading a network raises; the mode
        stays then.
        """
        if on and self.mode == 'mapping':
            if self._map is None:
                raise no_map_yet()
            scene, landmarks = self._map.finished(), self._localizer()
            if landmarks is not None and self._network.asks:
                written = self._map.network_job(scene)(landmarks.memory.points)
                self._asked = self._network.localizer(written, landmarks, 'the map made here')
        if not on and self._loaded is not None:
            self.load(self._loaded[0].path, extend=True)
            return f'mode is {self.mode}'
        if not on:
            self._network.loaded()
            self._asked = None
        self.mode = 'localization' if on else 'mapping'
        self._stream.forget()
        return f'mode is {self.mode}'

    def set_camera(self, camera: Camera) -> str:
        """A calibration arrived after mapping began without; '' if that changes nothing."""
        if self._map is None or self._map.mapper.results.camera_source == 'given':
            return ''
        if self._map.keyframes >= YOUNG_KEYFRAMES:
            return ('the calibration came after the map was made with a guessed camera; reset '
                    'to use it')
        self._clear()
        return 'the calibration came late; the map is started again with it'

    def set_odometry_scale(self, metres_per_unit: float) -> None:
        """Length of a unit of a monocular map, as odometry measured it."""
        if self._map is not None:
            self._map.metres_per_unit = metres_per_unit

    def _clear(self) -> None:
        self._map = self._newest = self._loaded = self._asked = None
        self._stream = LocalizedStream(self.config.tracking)

    # -- what others see -------------------------------------------------------------------

    @property
    def info(self) -> SessionInfo:
        """Where the session stands."""
        if self._loaded is not None:
            saved, localizer = self._loaded
            return SessionInfo(self.mode, True, saved.info.keyframes, localizer.memory.nbytes,
                               saved.info.metres_per_unit, saved.info.scale_source,
                               saved.info.camera_source, saved.info.frame,
                               asked=_asked(self._asked))
        if self._map is None:
            return SessionInfo(self.mode, False, 0, self._memory_bytes, None, 'unknown', 'given',
                               'first camera')
        made, mapper, (metres, scale_source) = self._map, self._map.mapper, self._map.scale
        return SessionInfo(self.mode, made.keyframes > 0, made.keyframes, self._memory_bytes,
                           metres, scale_source, mapper.results.camera_source,
                           mapper.results.gauge.frame, mapper.source.progress,
                           made.unsaved_keyframes, mapper.source.is_busy, _asked(self._asked))

    def keyframe_poses(self) -> Trajectory:
        """Keyframes of the map that is being made, as it knows them now."""
        return Trajectory() if self._map is None else self._map.mapper.results.keyframe_poses()

    def cloud_source(self, newest_only: bool = False) -> CloudSource | None:
        """What a cloud can be fused from on another thread; None without a map.

        A loaded map brings its whole cloud from its folder.
        """
        if self._loaded is not None:
            cloud = self._loaded[0].cloud()
            # Fused already, without metres by cubes of half the side: a finer grid keeps all.
            return CloudSource((cloud.xyz,), (cloud.rgb,), (np.eye(4),),
                               self.config.cloud.voxel_m / 2, self.config.cloud.max_points)
        return None if self._map is None else self._map.mapper.results.cloud_source(newest_only)


def _asked(network: NetworkLocalizer | None) -> str:
    """What single images are looked for with, in words."""
    if network is None:
        return 'landmarks'
    return 'network' if network.refiner is None else 'network, landmarks decide'


def _pose_source(config: MapperConfig, encoder: Encoder, network: SessionNetwork | None,
                 newest: NewestMemory, on_ready: Callable[[], None]) -> PoseSource:
    """Windows of a network if there is one, else features; the memory relocalises lost cameras."""
    if network is None:
        return FeaturePoses(config, encoder, relocalise=newest.relocalise)
    return WindowPoses(config, network.windows, encoder, windows=network.windows.windows,
                       selects=True, relocalise=newest.relocalise, on_ready=on_ready)
