"""``LiveSession``: what a running robot asks of the core, whatever transports the images.

    frames -> process -> Estimate      mapping: track, extend the map, write the memory
                                       localization: follow the camera in a frozen memory
              locate                   one image against the memory; never writes
              save, load, reset, set_localization

One thread calls it. Work that may take seconds and needs no part of the live state (polishing
a copy of the memory, writing a folder, fusing a cloud) comes back as a job for another thread.
A call that fails leaves the session as it was.
"""

from __future__ import annotations

import threading
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
from feedforward_recon.localization.follower import Follower
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.mapping.cloud import CloudSource
from feedforward_recon.mapping.mapper import OnlineReconstructor
from feedforward_recon.mapping.scene_map import Draft, SceneMap, Stats
from feedforward_recon.mapping.sources.live_windows import LiveWindows
from feedforward_recon.mapping.sources.window_parts import FeedForward
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.session.map_folder import SavedMap, check_map_output, load_map, save_map
from feedforward_recon.session.networks import load_network
from feedforward_recon.types import Estimate, Frame, Status, Trajectory

Mode = Literal['mapping', 'localization']
NO_MAP = 'NO_MAP'
YOUNG_KEYFRAMES = 20  # a map of fewer is restarted rather than kept with a guessed camera


@dataclass(frozen=True)
class SessionInfo:
    """Where a session stands.

    keyframes: of the map that is being made; memory_bytes: of the memory, saved or not.
    metres_per_unit: None while the scale is unknown. frame, scale_source and camera_source as in
    ``SceneMap``. window: what the window of a feed-forward network waits for, '' without.
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


def session_of(config: NodeConfig, on_ready: Callable[[], None] = lambda: None) -> LiveSession:
    """The session that the settings of a node describe, with its networks and its map.

    Raises ConfigError, CheckpointError or MapError for what cannot be used.
    """
    from feedforward_recon.model.compact import CompactEncoder

    config.check()
    session = LiveSession(config.mapper, CompactEncoder.load(config=config.encoder), config.mode,
                          load_network=partial(load_network, config) if config.feeds_forward
                          else None, on_ready=on_ready)
    if config.mode == 'localization' and config.map:
        session.load(config.map)
    return session


@dataclass
class _LastSave:
    """The last save of one map: SHA-256 of its map.yaml, and how far the map was."""

    sha256: str = ''
    stand: tuple[int, int] = (0, 0)


class _OutOfTimeError(Exception):
    """Polishing was told to end."""


class LiveSession:
    """A map that is being made, or one that was loaded, and the mode it is used in.

    load_network: brings the feed-forward network that maps, once mapping begins; None maps with
    the encoder alone. hurry: once set, the memory is saved without being polished.
    on_ready: called on another thread when ``work`` has something to do.
    Raises what load_network raises.
    """

    def __init__(self, config: MapperConfig, encoder: Encoder, mode: Mode = 'mapping', *,
                 load_network: Callable[[], FeedForward] | None = None,
                 on_ready: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self.encoder = encoder
        self.mode: Mode = mode
        self.on_ready = on_ready
        self._load_network = load_network
        self._network = load_network() if load_network and mode == 'mapping' else None
        self._mapper: OnlineReconstructor | LiveWindows | None = None
        self._writer = MemoryWriter(config.memory, encoder.dim)
        self.memory_bytes = self._writer.snapshot().nbytes  # fixed from the start
        self._saved: SavedMap | None = None
        self._localizer: Localizer | None = None
        self._follower: Follower | None = None
        self._frozen_at = -1  # keyframes in the memory that the localizer reads
        self._hint: np.ndarray | None = None
        self._odometry_scale: float | None = None
        self.hurry = threading.Event()
        self._last_save = _LastSave()

    def configure(self, config: MapperConfig) -> None:
        """Take over settings of the localizer that changed while running."""
        self.config = replace(self.config, localizer=config.localizer)
        if self._localizer is not None:
            self._localizer = Localizer(self._localizer.memory, self.encoder, config.localizer,
                                        self._localizer.camera)

    # -- images ----------------------------------------------------------------------------

    def process(self, frame: Frame, T_map_first: np.ndarray | None = None, *,
                settle: bool = True,
                on_pose: Callable[[Estimate], None] | None = None) -> Estimate:
        """One frame of the stream, in the present mode.

        T_map_first: pose of the camera if this frame starts a map (see OnlineReconstructor).
        settle: finish what a keyframe is followed by; else ``work`` does it between frames, and
        on_pose is told the pose of a tracked frame before the frame becomes a keyframe.
        Raises InputError for an image that cannot be used.
        """
        if self.mode == 'localization':
            return self._follow(frame, settle)
        if self._mapper is None:
            self._mapper = self._new_mapper(T_map_first)
        if T_map_first is not None and not self._mapper.stats.keyframes:
            self._mapper.T_map_first = T_map_first
        return self._mapper.process(frame) if settle else self._mapper.track(frame, on_pose)

    def _follow(self, frame: Frame, settle: bool) -> Estimate:
        """One frame of a stream in the memory."""
        localizer = self._reader()
        if localizer is None:
            return _no_map(frame)
        if self._follower is None or self._follower.localizer is not localizer:
            self._follower = Follower(localizer, self.config.tracking)
        estimate = self._follower.process(self._with_camera(frame, localizer.camera), self._hint)
        if estimate.T_map_cam is not None:
            self._hint = estimate.T_map_cam
        while settle and self._follower.work():
            pass
        return estimate

    def _new_mapper(self, T_map_first: np.ndarray | None) -> OnlineReconstructor | LiveWindows:
        if self._network is not None:
            return LiveWindows(self.config, self._network, self.encoder, self._writer,
                               relocalise=self._ask_memory, on_ready=lambda: self.on_ready())
        return OnlineReconstructor(self.config, self.encoder, self._writer,
                                   relocalise=self._ask_memory, T_map_first=T_map_first)

    def work(self) -> bool:
        """One piece of what was put off by ``settle=False``; False when nothing is left."""
        if self.mode == 'localization':
            return self._follower is not None and self._follower.work()
        return self._mapper is not None and self._mapper.work()

    def late(self) -> list[Estimate]:
        """Poses of earlier frames that ``process``, ``work`` or ``save`` brought meanwhile."""
        return self._mapper.late() if isinstance(self._mapper, LiveWindows) else []

    @property
    def is_busy(self) -> bool:
        """A network is at work on a thread of its own."""
        return isinstance(self._mapper, LiveWindows) and self._mapper.is_busy

    def locate(self, frame: Frame, T_map_cam_hint: np.ndarray | None = None) -> Estimate:
        """Find one image in the memory; nothing is written.

        Raises InputError when the image comes without a camera and the map knows none for it.
        """
        localizer = self._reader()
        if localizer is None:
            return _no_map(frame)
        return localizer.localize(self._with_camera(frame, localizer.camera), T_map_cam_hint)

    def hint(self, T_map_cam: np.ndarray) -> None:
        """Somebody says where the camera is, in map units; tried first, never trusted."""
        self._hint = T_map_cam
        self._continue_nothing()

    def _continue_nothing(self) -> None:
        """In a stream that is followed, the next image is looked up in the memory."""
        if self._follower is not None:
            self._follower.forget()

    def _ask_memory(self, frame: Frame) -> Estimate:
        return self.locate(frame, self._hint)

    @staticmethod
    def _with_camera(frame: Frame, camera: Camera | None) -> Frame:
        if frame.camera is not None or camera is None:
            return frame
        if camera.size_wh != (frame.image.shape[1], frame.image.shape[0]):
            raise InputError(f'expected intrinsics for {frame.image.shape[1]}x'
                             f'{frame.image.shape[0]} images, found none, and the map was made '
                             f'with {camera.width}x{camera.height}; give a calibration')
        return replace(frame, camera=camera)

    def _reader(self) -> Localizer | None:
        """A localizer on the newest frozen memory; None without a map."""
        if self._saved is None and self._mapper is not None and self._writer.filled \
                and self._frozen_at != self._writer.slots.writes:
            self._frozen_at = self._writer.slots.writes
            self._localizer = Localizer(self._writer.snapshot(), self.encoder,
                                        self.config.localizer, self._mapper.camera)
        return self._localizer

    # -- the map ---------------------------------------------------------------------------

    def save(self, path: str | Path) -> Callable[[], SavedMap]:
        """Settle the map; the job polishes a copy of the memory and writes the folder.

        The job raises InputError or MapError when the folder cannot be written. Raises MapError
        when there is no map of our own to save, InputError for an impossible path.
        """
        if not str(path):
            raise InputError("expected a folder in the parameter 'map', found ''; set it")
        if self._saved is not None:
            raise MapError(f'expected a map made here, found the one loaded from '
                           f'{self._saved.path}, which is saved already')
        check_map_output(path)
        scene = self._finished()
        return self._saving(path, Draft(lambda: scene, []), polished=True)

    def autosave(self, path: str | Path) -> Callable[[], SavedMap] | None:
        """A job that writes the map as it stands, neither refined nor polished.

        Taking it keeps nobody waiting. None while there is nothing that was not saved before.
        Raises InputError for an impossible path.
        """
        mapper = self._mapper
        if mapper is None or not self.unsaved_keyframes:
            return None
        check_map_output(path)
        return self._saving(path, mapper.draft(), polished=False)

    @property
    def unsaved_keyframes(self) -> int:
        """Keyframes of a map that changed since it was saved; 0 when nothing would be lost."""
        return 0 if self._saved is not None or self._stand == self._last_save.stand \
            else self.info.keyframes

    @property
    def _stand(self) -> tuple[int, int]:
        """Changes with the map; the frames between two keyframes do not count."""
        stats = Stats() if self._mapper is None else self._mapper.stats
        return stats.keyframes, stats.corrections

    def _saving(self, path: str | Path, draft: Draft, *, polished: bool) -> Callable[[], SavedMap]:
        state, stand, last = self._writer.state(), self._stand, self._last_save
        metres, config, encoder = self._odometry_scale, self.config, self.encoder

        def job() -> SavedMap:
            made = draft.scene()
            if metres is not None and made.metres_per_unit is None:
                made = replace(made, metres_per_unit=metres, scale_source='odometry')
            copy = MemoryWriter.from_state(config.memory, state)
            if polished and not self._polish(copy):
                copy = MemoryWriter.from_state(config.memory, state)
            for keyframe in draft.pending:
                copy.write(keyframe)
            saved = save_map(path, made, copy, encoder, config, replaces=last.sha256)
            last.sha256, last.stand = saved.sha256, stand
            return saved

        return job

    def _polish(self, writer: MemoryWriter) -> bool:
        """Polish a copy of the memory; False when there was no time left to end it."""
        def check(_: int) -> None:
            if self.hurry.is_set():
                raise _OutOfTimeError

        try:
            writer.polish(progress=check)
        except _OutOfTimeError:
            return False
        return True

    def load(self, path: str | Path) -> SavedMap:
        """Localise in a saved map from now on; the map that was being made is given up.

        Raises MapError, and keeps everything, when the folder cannot be used.
        """
        if not str(path):
            raise MapError("expected a map folder in the parameter 'map', found ''; set it")
        saved = load_map(path)
        encoder = saved.load_encoder()
        localizer = Localizer(saved.memory, encoder, self.config.localizer, saved.info.camera)
        self._clear()
        self._saved, self._localizer, self.encoder = saved, localizer, encoder
        self.mode = 'localization'
        return saved

    def reset(self) -> str:
        """Forget the map that is being made, or in a loaded one where the camera was."""
        if self._saved is not None:
            self._hint = None
            self._continue_nothing()
            return f'forgot the last pose; the map loaded from {self._saved.path} stays'
        keyframes = self.info.keyframes
        self._clear()
        return f'forgot the map of {keyframes} keyframes'

    def set_localization(self, on: bool) -> str:
        """Freeze the map and localise in it, or go on mapping.

        Raises MapError where that makes no sense, and what loading a network raises; the mode
        stays then.
        """
        if on and self.mode == 'mapping':
            self._finished()
        if not on and self._saved is not None:
            raise MapError(f'expected a map made here, found the one loaded from '
                           f'{self._saved.path}, which is not extended; clean the node up '
                           'and configure it in mapping mode')
        if not on and self._network is None and self._load_network is not None:
            self._network = self._load_network()
        self.mode = 'localization' if on else 'mapping'
        self._continue_nothing()
        return f'mode is {self.mode}'

    def set_camera(self, camera: Camera) -> str:
        """A calibration arrived after mapping began without; '' if that changes nothing."""
        mapper = self._mapper
        if mapper is None or mapper.camera_source == 'given':
            return ''
        if mapper.stats.keyframes >= YOUNG_KEYFRAMES:
            return ('the calibration came after the map was made with a guessed camera; reset '
                    'to use it')
        self._clear()
        return 'the calibration came late; the map is started again with it'

    def set_odometry_scale(self, metres_per_unit: float) -> None:
        """Odometry has told how long a unit of a monocular map is."""
        self._odometry_scale = metres_per_unit

    def _clear(self) -> None:
        self._mapper, self._saved, self._localizer, self._follower = None, None, None, None
        self._writer = MemoryWriter(self.config.memory, self.encoder.dim)
        self._frozen_at, self._hint, self._odometry_scale = -1, None, None
        self._last_save = _LastSave()

    def _finished(self) -> SceneMap:
        """The map with everything done that can be; mapping may go on."""
        scene = SceneMap() if self._mapper is None else self._mapper.finish()
        if not scene.keyframes:
            raise MapError('expected a map, found none yet; move the camera through a textured '
                           'place first')
        return scene

    # -- what others see -------------------------------------------------------------------

    @property
    def info(self) -> SessionInfo:
        """Where the session stands."""
        if self._saved is not None:
            known = self._saved.info
            return SessionInfo(self.mode, True, known.keyframes, self._saved.memory.nbytes,
                               known.metres_per_unit, known.scale_source, known.camera_source,
                               known.frame)
        mapper = self._mapper
        if mapper is None:
            return SessionInfo(self.mode, False, 0, self.memory_bytes, None, 'unknown', 'given',
                               'first camera')
        metric = mapper.scale_source != 'unknown'
        scale = 1.0 if metric else self._odometry_scale
        source = 'unknown' if scale is None else mapper.scale_source if metric else 'odometry'
        return SessionInfo(self.mode, mapper.stats.keyframes > 0, mapper.stats.keyframes,
                           self.memory_bytes, scale, source, mapper.camera_source, mapper.frame,
                           mapper.progress if isinstance(mapper, LiveWindows) else '')

    def keyframe_poses(self) -> Trajectory:
        """Keyframes of the map that is being made, as it knows them now."""
        return Trajectory() if self._mapper is None else self._mapper.keyframe_poses()

    def cloud_source(self, newest_only: bool = False) -> CloudSource | None:
        """What a cloud can be fused from on another thread; None without a map.

        A loaded map brings its whole cloud from its folder.
        """
        if self._saved is not None:
            cloud = self._saved.cloud()
            return CloudSource((cloud.xyz,), (cloud.rgb,), (np.eye(4),),
                               self.config.cloud.voxel_m, self.config.cloud.max_points)
        return None if self._mapper is None else self._mapper.cloud_source(newest_only)


def _no_map(frame: Frame) -> Estimate:
    return Estimate(frame.stamp_ns, Status.NOT_LOCALISED, reason=NO_MAP, source=frame.source)
