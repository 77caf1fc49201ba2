"""Every setting of a ROS node: those of the mapper, and those of its ports.

ROS-free, so that the command line reads the parameter files of the nodes as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from feedforward_recon.config.network import NETWORKS, ModelOptions
from feedforward_recon.config.schema import MapperConfig, option
from feedforward_recon.errors import ConfigError

FRAMES = ('map_frame', 'odom_frame', 'base_frame')


@dataclass(frozen=True)
class NodeConfig(ModelOptions, MapperConfig):
    """All settings of a mapping or localisation node; live ones may change while it runs."""

    map: str = option('', 'folder that save_map writes and load_map reads; ~ is the home folder',
                      live=True)
    fresh: bool = option(False, 'in mapping mode: start a new map also where the folder map holds '
                         'one; else mapping goes on with it', fixed=True)
    autosave_s: float = option(60.0, 'a growing map is saved to the folder map this often, '
                               'unrefined; 0: never', low=0.0, high=86_400.0,
                               unit='s', live=True)
    mode: Literal['mapping', 'localization'] = option(
        'mapping', 'what the node does when it starts', choices=('mapping', 'localization'))
    autostart: bool = option(True, 'configure and activate without being asked to',
                             fixed=True)
    queue: str = option('live', 'when images come faster than they are used: live drops the '
                        'oldest and counts it, offline makes the sender wait',
                        choices=('live', 'offline'))
    queue_size: int = option(2, 'images that may wait', low=1, high=1000)
    image_transport: str = option('auto', 'compressed listens to <image>/compressed; auto does so '
                                  'where only that is published',
                                  choices=('auto', 'raw', 'compressed'))
    depth_transport: str = option('auto', 'compressed listens to <depth>/compressedDepth; auto '
                                  'does so where only that is published',
                                  choices=('auto', 'raw', 'compressed'))
    image_qos: str = option('auto', 'reliability of the sensor inputs; auto is reliable when '
                            'every publisher is', choices=('auto', 'reliable', 'best_effort'))
    use_depth: bool = option(True, 'use depth images when there are any')
    use_stereo: bool = option(True, 'use right images of a stereo pair when there are any and '
                              'there is no depth')
    rectified: bool = option(False, 'images are rectified already: the projection matrix P of '
                             'CameraInfo holds, its distortion does not')
    depth_slop_ms: float = option(50.0, 'largest difference between the stamps of an image and '
                                  'its depth', low=0.0, high=1000.0, unit='ms', live=True)
    stereo_slop_ms: float = option(10.0, 'largest difference between the stamps of a left and a '
                                   'right image', low=0.0, high=1000.0, unit='ms', live=True)
    # Fast DDS repairs a lost first message of a reliable publisher after 3 s at the latest.
    info_wait_s: float = option(4.0, 'images wait this long for the first CameraInfo; then '
                                'mapping starts uncalibrated', low=0.0, high=60.0, unit='s')

    map_frame: str = option('map', 'TF frame of the map')
    odom_frame: str = option('odom', 'TF frame of the odometry')
    base_frame: str = option('base_link', 'TF frame of the robot')
    camera_frame: str = option('', 'optical TF frame of the camera; empty takes it from the '
                               'image header')
    tf_mode: str = option('auto', 'which transform is sent; auto looks for base_frame and '
                          'odom_frame on TF',
                          choices=('auto', 'map_to_odom', 'map_to_base', 'map_to_camera',
                                   'none'))
    tf_rate_hz: float = option(20.0, 'how often map -> odom is sent again', low=0.1, high=200.0,
                               unit='Hz', live=True)
    tf_tolerance_s: float = option(0.2, 'how far into the future map -> odom is dated',
                                   low=0.0, high=5.0, unit='s', live=True)
    tf_wait_s: float = option(0.5, 'an image waits this long for the transforms at its stamp',
                              low=0.0, high=10.0, unit='s', live=True)
    pose_timeout_s: float = option(5.0, 'map -> odom is sent for this long after the last '
                                   'measured pose; 0: for ever', low=0.0, high=3600.0, unit='s',
                                   live=True)

    path_length: int = option(5000, 'newest poses kept in the path', low=1, high=1_000_000,
                              live=True)
    cloud_period_s: float = option(2.0, 'least time between two point clouds', low=0.1,
                                   high=600.0, unit='s', live=True)
    localize_with: str = option('auto', 'what localize and query_image ask: landmarks; network, '
                                'the fast weights that the network model wrote of the map; auto: '
                                'both where the map holds those, and the landmarks decide',
                                choices=('auto', 'landmarks', 'network'))
    localize_timeout_s: float = option(10.0, 'the service localize answers within this time',
                                       low=0.1, high=300.0, unit='s', live=True)
    silence_s: float = option(3.0, 'no image for this long is reported', low=0.1, high=3600.0,
                              unit='s', live=True)
    jump_s: float = option(1.0, 'stamps that go back by more than this restart the time line',
                           low=0.01, high=3600.0, unit='s', live=True)

    def __post_init__(self) -> None:
        """Refuse frame names that TF cannot hold together.

        Raises ConfigError for an empty, absolute or repeated frame name.
        """
        for name in FRAMES:
            if not getattr(self, name):
                raise ConfigError(f"expected the name of a TF frame for {name}, found ''")
        for name in (*FRAMES, 'camera_frame'):
            value = getattr(self, name)
            if value.startswith('/'):
                raise ConfigError(f'expected {name} without a leading slash, found {value!r}; '
                                  f'use {value.lstrip("/")!r}')
        if len({getattr(self, name) for name in FRAMES}) < len(FRAMES):
            found = ', '.join(f'{name}={getattr(self, name)!r}' for name in FRAMES)
            raise ConfigError(f'expected three different TF frames, found {found}')

    def check(self, spelled: Mapping[str, str] | None = None) -> None:
        """Refuse what ``compact`` would not use. Raises ConfigError."""
        super().check(spelled)
        if self.localize_with == 'network' and not self.feeds_forward:
            raise ConfigError('expected a feed-forward network beside localize_with network, '
                              f'found model compact; choose another ({", ".join(NETWORKS)}) or '
                              'localize_with landmarks')

    @property
    def mapper(self) -> MapperConfig:
        """The settings of the mapper alone, as they are saved with a map."""
        return MapperConfig(**{spec.name: getattr(self, spec.name)
                               for spec in dataclasses.fields(MapperConfig)})


@dataclass(frozen=True)
class Setting:
    """One leaf of a configuration: its dotted name, declaration and value.

    when: 'live': a change takes effect at once; 'configure': when the node is configured anew;
        'start': it is read only when the node starts.
    """

    name: str
    spec: dataclasses.Field
    value: Any
    when: str


def each_setting(config: Any, where: str = '', live: bool = False) -> Iterator[Setting]:
    """Every setting of a configuration, in the order of its declaration."""
    for spec in dataclasses.fields(config):
        value, name = getattr(config, spec.name), f'{where}{spec.name}'
        alive = live or bool(spec.metadata.get('live'))
        if dataclasses.is_dataclass(value):
            yield from each_setting(value, f'{name}.', alive)
        else:
            fixed = bool(spec.metadata.get('fixed'))
            yield Setting(name, spec, value,
                          'live' if alive else 'start' if fixed else 'configure')
