"""What a player plays, and when: sources, rendered rooms, and the time line of a replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from feedforward_recon.config.schema import option
from feedforward_recon.errors import ConfigError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io import Source, SourceOptions, open_source
from feedforward_recon.types import Frame

SYNTHETIC = 'synthetic:'
SECOND_NS = 1_000_000_000
UNKNOWN_STEP_NS = 100_000_000


@dataclass(frozen=True)
class SyntheticConfig:
    """The walk through a rendered room, for the source synthetic:SEED."""

    width: int = option(480, 'image width', low=16, high=4096, unit='px')
    height: int = option(360, 'image height', low=16, high=4096, unit='px')
    fov_deg: float = option(68.0, 'horizontal field of view', low=10.0, high=150.0, unit='deg')
    frames: int = option(170, 'images of the walk', low=1, high=100_000)
    fps: float = option(7.0, 'images per second of the walk', low=0.1, high=120.0, unit='Hz')
    walk_seed: int = option(0, 'which walk', low=0)
    baseline_m: float = option(0.0, 'a right camera this far beside the camera; 0: none', low=0.0,
                               high=1.0, unit='m')
    held_out: int = option(0, 'instead of the walk, this many views beside it', low=0,
                           high=10_000)


@dataclass(frozen=True)
class PlayerConfig:
    """Settings of player_node."""

    source: str = option('', 'folder, video or bag to play, or synthetic:SEED for a rendered '
                         'room', fixed=True)
    rate: float = option(1.0, 'speed relative to the recording; 0 sends as fast as subscribers '
                         'acknowledge it', low=0.0, high=1000.0, fixed=True)
    loop: bool = option(False, 'start again at the end; stamps go on rising', fixed=True)
    wait_for_subscribers: bool = option(True, 'send nothing before somebody listens to the '
                                        'images', fixed=True)
    start_delay_s: float = option(1.5, 'pause after the last subscriber came', low=0.0,
                                  high=60.0, unit='s', fixed=True)
    image_transport: str = option('raw', 'compressed sends JPEG on <image>/compressed and PNG '
                                  'on <depth>/compressedDepth', choices=('raw', 'compressed'),
                                  fixed=True)
    reliable: bool = option(True, 'lost images are sent again; False is what most camera '
                            'drivers do', fixed=True)
    use_depth: bool = option(True, 'send depth where the source has it', fixed=True)
    use_stereo: bool = option(True, 'send right images where the source has them', fixed=True)
    depth_encoding: str = option('16UC1', 'raw depth in millimetres or in metres',
                                 choices=('16UC1', '32FC1'), fixed=True)
    frame_id: str = option('camera_optical_frame', 'TF frame of the images', fixed=True)
    world_frame: str = option('world', 'TF frame of ground_truth', fixed=True)
    stamps: str = option('recorded', 'stamps of the recording (from 1 s where they '
                         'start at 0), or of the moment of sending',
                         choices=('recorded', 'now'), fixed=True)
    publish_clock: bool = option(False, 'send /clock, for nodes with use_sim_time', fixed=True)
    step: int = option(1, 'play every so many images', low=1, high=100_000, fixed=True)
    max_frames: int = option(0, 'stop after so many images; 0: at the end', low=0, fixed=True)
    fov_deg: float = option(0.0, 'horizontal field of view of a source without calibration; 0: '
                            'unknown', low=0.0, high=178.0, unit='deg', fixed=True)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig,
                                       metadata={'doc': 'The rendered room.'})

    def __post_init__(self) -> None:
        """Refuse a clock that would not agree with the stamps, and a speed that nothing limits.

        Raises ConfigError.
        """
        if not self.rate and not self.reliable:
            raise ConfigError('expected reliable sending with rate 0, which waits for '
                              'acknowledgements, found reliable=false; set a rate')
        if self.publish_clock and self.stamps == 'now':
            raise ConfigError('expected recorded stamps with publish_clock, found stamps=now; '
                              'leave one of them out')


class SyntheticSource(Source):
    """A rendered room as a source of frames with depth or right images, and exact poses."""

    def __init__(self, seed: int, config: SyntheticConfig, options: SourceOptions) -> None:
        super().__init__(f'{SYNTHETIC}{seed}', options)
        from feedforward_recon.synthetic import Room  # textures take a moment to load

        self._config = config
        self._room = Room.generate(seed)
        self._poses = self._room.walk(config.frames, config.walk_seed, config.fps)
        if config.held_out:
            self._poses = self._room.held_out_views(self._poses, config.held_out,
                                                    config.walk_seed)
        self.has_depth, self.has_poses, self.calibrated = options.use_depth, True, True
        self.has_right = options.use_stereo and config.baseline_m > 0

    @property
    def total(self) -> int:
        """Images of the walk."""
        return len(self._poses)

    def _read(self, indices: range) -> Iterator[Frame]:
        config = self._config
        camera = Camera.from_fov(config.fov_deg, (config.width, config.height))
        from feedforward_recon.synthetic import right_image

        for index in indices:
            image, depth = self._room.render(camera, self._poses[index])
            yield Frame(round(index * 1e9 / config.fps), image,
                        depth if self.options.use_depth else None, camera,
                        f'{self.name}/{index:06d}', self._poses[index],
                        right_image(self._room, camera, self._poses[index], config.baseline_m)
                        if self.has_right else None)


def open_playback(config: PlayerConfig) -> Source:
    """The source that the settings name.

    Raises ConfigError without a source or for a bad seed, InputError for unreadable data.
    """
    options = SourceOptions(use_depth=config.use_depth, use_stereo=config.use_stereo,
                            fov_deg=config.fov_deg or None, step=config.step,
                            max_frames=config.max_frames or None)
    if not config.source:
        raise ConfigError('expected a source, found none; set the parameter source to a folder, '
                          'video, bag or synthetic:SEED')
    if not config.source.startswith(SYNTHETIC):
        return open_source(config.source, options)
    seed = config.source.removeprefix(SYNTHETIC)
    if not seed.isdecimal():
        raise ConfigError(f'expected synthetic:SEED with a number, found {config.source!r}')
    return SyntheticSource(int(seed), config.synthetic, options)


def rounds(source: Source, loop: bool) -> Iterator[Frame]:
    """The frames once or for ever; later rounds continue the stamps of the one before.

    Stamps that count from zero (videos, plain images) count from one second instead: in ROS a
    zero stamp means that nobody set it, and TF reads it as "the newest".
    """
    offset_ns: int | None = None
    while True:
        stamps_ns: list[int] = []
        for frame in source:
            if offset_ns is None:
                offset_ns = 0 if frame.stamp_ns > 0 else SECOND_NS - frame.stamp_ns
            stamps_ns = [*stamps_ns[:1], frame.stamp_ns]
            yield replace(frame, stamp_ns=frame.stamp_ns + offset_ns)
        if not loop or offset_ns is None:
            return
        length_ns = stamps_ns[-1] - stamps_ns[0]
        offset_ns += length_ns + (length_ns // max(len(source) - 1, 1) or UNKNOWN_STEP_NS)


class Timeline:
    """When each frame is due.

    rate: recorded seconds per second; 0 means at once.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._start: tuple[int, float] | None = None

    def due(self, stamp_ns: int, now_s: float) -> float:
        """The time, on the clock that now_s is of, at which a frame has to be sent."""
        if self._start is None:
            self._start = stamp_ns, now_s
        if not self.rate:
            return now_s
        return self._start[1] + (stamp_ns - self._start[0]) / 1e9 / self.rate
