"""`ros2 run feedforward_recon bag_mapper`: a bag becomes the map that mapping_node would make.

    bag -> /tf, /tf_static, odometry, IMU -> Surroundings
        -> images -> LiveSession.process -> map folder

Every image is used, in the order of its stamps, and no clock matters: the same bag gives the
same trajectory, bit for bit. Neither rclpy nor a running ROS is needed.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.console.options import (
    Json,
    Overwrite,
    Set,
    check_out,
    settings,
    takes_source_options,
)
from feedforward_recon.console.terminal import (
    bytes_text,
    print_json,
    print_table,
    progress_bar,
    run,
    taught,
)
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import make_transform, matrix_from_quat_xyzw
from feedforward_recon.io import SourceOptions, open_source, require_cameras
from feedforward_recon.io.bag import BagSource
from feedforward_recon.io.source import SECOND_NS
from feedforward_recon.ros.frames import Frames, OdometryScale
from feedforward_recon.ros.tf_buffer import TransformBuffer, TransformError
from feedforward_recon.session.live import LiveSession, session_of
from feedforward_recon.session.map_folder import MEMORY, TRAJECTORY, SavedMap
from feedforward_recon.types import Estimate, Frame, Trajectory

log = logging.getLogger(__name__)

TF, ODOMETRY, IMU = 'tf2_msgs/msg/TFMessage', 'nav_msgs/msg/Odometry', 'sensor_msgs/msg/Imu'
FOREVER_S = 1e9

Bag = Annotated[Path, typer.Option('--bag', help='ROS 2 bag: folder, .mcap or .db3.',
                                   show_default=False)]
Map = Annotated[Path, typer.Option('--map', '--out', '-o', help='Map folder to write.',
                                   show_default=False)]
Parameters = Annotated[Path | None, typer.Option(
    '--params-file', help='Parameter file of mapping_node, see config/mapping.yaml.',
    show_default=False)]
OdomTopic = Annotated[str, typer.Option(
    '--odom-topic', help='Bag topic of the odometry; default: the only one.', metavar='TOPIC',
    show_default=False, rich_help_panel='Source')]


class Surroundings:
    """What a bag holds beside its images: the tree of frames, odometry and gravity.

    The whole bag is known before the first image, so nothing comes too late.
    """

    def __init__(self, bag: BagSource, config: NodeConfig, odom_topic: str = '') -> None:
        """Read TF, odometry and accelerations.

        Raises InputError for an unknown odometry topic, or several and no choice.
        """
        self.buffer = TransformBuffer(FOREVER_S)
        self.frames = Frames(config, self.buffer)
        self.camera_frame = config.camera_frame or bag.frame_id
        self._accelerations: list[tuple[int, str, np.ndarray]] = []
        self._config = config
        odometry = _odometry_topics(bag, odom_topic)
        takers = {**dict.fromkeys(odometry, self._take_odometry),
                  **dict.fromkeys(bag.topics_of(IMU), self._take_imu)}
        tf_topics = bag.topics_of(TF)
        for topic, message in bag.messages({*takers, *tf_topics}):
            if topic in takers:
                takers[topic](message)
            else:
                self._take_tf(message, topic.endswith('/tf_static'))

    def _take_tf(self, message: Any, static: bool) -> None:
        """Add what does not hang below the map: that place is for the new map."""
        kept = [t for t in message.transforms
                if t.header.frame_id.lstrip('/') != self._config.map_frame]
        for sentence in self.buffer.take(kept, static):
            log.warning('%s', sentence)

    def _take_odometry(self, message: Any) -> None:
        at, turn = message.pose.pose.position, message.pose.pose.orientation
        self.frames.take_odometry(
            message.header.frame_id or self._config.odom_frame,
            message.child_frame_id or self._config.base_frame,
            make_transform(matrix_from_quat_xyzw(np.array([turn.x, turn.y, turn.z, turn.w])),
                           np.array([at.x, at.y, at.z])), _stamp_ns(message))

    def _take_imu(self, message: Any) -> None:
        force = message.linear_acceleration
        self._accelerations.append((_stamp_ns(message), message.header.frame_id,
                                    np.array([force.x, force.y, force.z])))

    def first_pose(self, frame: Frame) -> tuple[np.ndarray, str]:
        """T_map_cam [4, 4] of the image that starts the map, and what tells its vertical."""
        until_ns = frame.stamp_ns + int(self._config.tf_wait_s * SECOND_NS)
        for stamp_ns, imu_frame, acceleration in self._accelerations:
            if stamp_ns <= until_ns:
                self.frames.add_acceleration(imu_frame, acceleration)
        return self.frames.first_pose(self.camera_frame, frame.stamp_ns,
                                      frame.depth is not None or frame.right is not None)

    def odometry(self, stamp_ns: int) -> np.ndarray | None:
        """Position [3] of the camera in metres, as odometry has it; None where it is silent."""
        try:
            return self.buffer.lookup(self._config.odom_frame, self.camera_frame,
                                      stamp_ns)[:3, 3]
        except TransformError:
            return None


@dataclass(frozen=True)
class BagMap:
    """A mapped bag.

    up_source: what the vertical was taken from. seconds: of reading and mapping.
    """

    bag: BagSource
    saved: SavedMap
    trajectory: Trajectory
    up_source: str
    seconds: float


def map_bag(bag: BagSource, config: NodeConfig, out: Path, odom_topic: str = '') -> BagMap:
    """Map a whole bag into a folder.

    Raises InputError for data that cannot be used, MapError when nothing could be mapped.
    """
    started = time.perf_counter()
    surroundings = Surroundings(bag, config, odom_topic)
    session = session_of(replace(config, mode='mapping', map=''))
    scale = OdometryScale()
    T_map_first, up_source = None, ''
    with progress_bar('mapping', len(bag)) as bar:
        for frame in bag:
            if T_map_first is None:
                T_map_first, up_source = surroundings.first_pose(frame)
            estimate = session.process(frame, T_map_first)
            for posed in (estimate, *session.late()):
                _add_scale(session, scale, posed, surroundings)
            bar.advance(estimate.status.value.lower())
    saved = session.save(out)()
    return BagMap(bag, saved, saved.trajectory(), up_source, time.perf_counter() - started)


def _add_scale(session: LiveSession, scale: OdometryScale, estimate: Estimate,
               surroundings: Surroundings) -> None:
    """A monocular map gets its metres from odometry, as soon as that is certain."""
    if session.info.metres_per_unit is not None or estimate.T_map_cam is None:
        return
    position = surroundings.odometry(estimate.stamp_ns)
    if position is not None and scale.add(estimate.T_map_cam[:3, 3], position) \
            and scale.metres_per_unit is not None:
        session.set_odometry_scale(scale.metres_per_unit)


def trajectory_hash(trajectory: Trajectory) -> str:
    """SHA-256 of all stamps and poses, to the last bit."""
    digest = hashlib.sha256(np.ascontiguousarray(trajectory.stamps_ns, '<i8').tobytes())
    digest.update(np.ascontiguousarray(trajectory.T_map_cam, '<f8').tobytes())
    return digest.hexdigest()


@takes_source_options
def bag_mapper(bag: Bag, out: Map, options: SourceOptions, params_file: Parameters = None,
               set_: Set = None, odom_topic: OdomTopic = '', overwrite: Overwrite = False,
               json_: Json = False) -> None:
    """Map a ROS 2 bag into a folder, as mapping_node would if it never missed an image.

    TF, odometry and IMU in the bag are used: the map is upright, and metric where depth or
    odometry tell its scale. Parameters of queues, transports and timers have no meaning here.

    Examples:
      bag_mapper --bag drive/ --map maps/yard
      bag_mapper --bag drive.mcap --map maps/yard --params-file mapping.yaml
      bag_mapper --bag drive/ --map maps/yard --image-topic /left/image_raw
    """
    config = settings(NodeConfig(), params_file, set_)
    check_out(out, overwrite)
    source = open_source(bag, replace(
        options, use_depth=options.use_depth and config.use_depth,
        use_stereo=options.use_stereo and config.use_stereo,
        rectified=options.rectified or config.rectified))
    if not isinstance(source, BagSource):
        raise InputError(f'{bag}: expected a ROS 2 bag, found another source; use `ffrecon map`')
    if source.has_depth or source.has_right:
        require_cameras(source)
    summary = _summary(map_bag(source, config, out, odom_topic))
    if json_:
        print_json(summary)
    else:
        print_table(f'map in {summary["map"]}', _rows(summary))


def _odometry_topics(bag: BagSource, wanted: str) -> list[str]:
    """The odometry to use: the wanted topic, the only one, or none. Raises InputError."""
    topics = bag.topics_of(ODOMETRY)
    if wanted and wanted not in topics:
        raise InputError(f'{bag.name}: expected odometry on topic {wanted}, found '
                         f'{", ".join(topics) or "none"}; choose one of those in the bag')
    if not wanted and len(topics) > 1:
        raise InputError(f'{bag.name}: expected one odometry topic, found {", ".join(topics)}; '
                         'choose with --odom-topic')
    return [wanted] if wanted else topics


def _stamp_ns(message: Any) -> int:
    stamp = message.header.stamp
    return stamp.sec * SECOND_NS + stamp.nanosec


def _summary(result: BagMap) -> dict[str, Any]:
    info = result.saved.info
    return {'bag': result.bag.name, 'map': str(result.saved.path),
            'trajectory': str(result.saved.path / TRAJECTORY),
            'image_topic': result.bag.image_topic, 'depth_topic': result.bag.depth_topic,
            'right_image_topic': '' if result.bag.right is None else result.bag.right.topic,
            'frames': info.images, 'tracked': info.tracked,
            'tracked_share': info.tracked / max(info.images, 1), 'keyframes': info.keyframes,
            'points': info.points, 'seconds': result.seconds,
            'memory_bytes': info.files[MEMORY]['bytes'],
            'metres_per_unit': info.metres_per_unit, 'scale_source': info.scale_source,
            'camera_source': info.camera_source, 'up_source': result.up_source,
            'trajectory_sha256': trajectory_hash(result.trajectory)}


def _rows(summary: dict[str, Any]) -> dict[str, str]:
    metres = summary['metres_per_unit']
    topics = filter(None, (summary['image_topic'], summary['right_image_topic'],
                           summary['depth_topic']))
    return {
        'topics': ', '.join(topics),
        'frames': f'{summary["frames"]}, {100 * summary["tracked_share"]:.1f} % tracked',
        'keyframes': str(summary['keyframes']),
        'time': f'{summary["seconds"]:.1f} s',
        'memory': f'{bytes_text(summary["memory_bytes"])}, all that localising needs',
        'scale': 'unknown (no depth, no stereo, no odometry)' if metres is None
                 else f'{metres:.4g} m per unit, from {summary["scale_source"]}',
        'camera': summary['camera_source'],
        'upright by': summary['up_source'],
        'trajectory': f'{TRAJECTORY}, SHA-256 {summary["trajectory_sha256"][:16]}'}


app = typer.Typer(name='bag_mapper', add_completion=False, pretty_exceptions_enable=False,
                  context_settings={'help_option_names': ['-h', '--help']})
app.command(help=taught(bag_mapper))(bag_mapper)


def main() -> None:
    """Map the bag that the command line names; exit code 2 for bad input."""
    raise SystemExit(run(app, None))


if __name__ == '__main__':
    main()
