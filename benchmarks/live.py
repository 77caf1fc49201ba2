"""A camera at 15 Hz into the nodes over DDS: how late poses are, what is left out, what it costs.

``python -m benchmarks.live --seconds 600`` shows how the memory of mapping_node grows while all
of its outputs are watched.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import KITCHEN, PRECISE, REPOSITORY, data_root
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.io.bag_writer import write_bag
from feedforward_recon.synthetic import Room, render_walk

sys.path.insert(0, str(REPOSITORY / 'test'))  # processes in a ROS domain of their own

SECONDS, RATE_HZ, START_S = 60.0, 15.0, 60.0
REPEATED = 150  # images of the bag that is mapped twice
STEADY = 0.6  # share of the run after which the walk repeats: little should be new
SAVE_S = 300.0  # saving the map takes less
log = logging.getLogger(__name__)


@dataclass
class Watch:
    """What a bystander sees of a run.

    sent_ns, poses_ns: stamps, in the order of arrival. latency_ms: one for each pose.
    waiting: images that had been sent and not answered when a pose came.
    usage: (s, MB of resident memory, CPU s) of the node.
    true, found: positions [3] by stamp.
    """

    sent_ns: list[int] = field(default_factory=list)
    poses_ns: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    usage: list[tuple[float, float, float]] = field(default_factory=list)
    true: dict[int, np.ndarray] = field(default_factory=dict)
    found: dict[int, np.ndarray] = field(default_factory=dict)
    is_over: bool = False

    def start(self) -> None:
        """What came until now was the node waking up."""
        for values in (self.sent_ns, self.poses_ns, self.latency_ms, self.waiting):
            values.clear()

    def image(self, stamp_ns: int) -> None:
        """An image was sent."""
        if self.is_over:
            return
        self.sent_ns.append(stamp_ns)

    def pose(self, stamp_ns: int, position: np.ndarray) -> None:
        """Its pose came."""
        if self.is_over:
            return
        self.found[stamp_ns] = position
        self.latency_ms.append((time.time_ns() - stamp_ns) / 1e6)
        self.waiting.append(len(self.sent_ns) - bisect_right(self.sent_ns, stamp_ns))
        self.poses_ns.append(stamp_ns)

    def error_m(self) -> float | None:
        """RMS distance from the truth after one SE(3) alignment; None where it is unknown."""
        both = sorted(self.true.keys() & self.found.keys())
        if len(both) < 3:
            return None
        return align_points(np.array([self.found[stamp] for stamp in both]),
                            np.array([self.true[stamp] for stamp in both]),
                            with_scale=False).rmse


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the live table; nothing without a ROS."""
    from ros_support.harness import missing_ros

    if missing_ros():
        raise InputError(missing_ros())
    with tempfile.TemporaryDirectory() as folder:
        name, source = _source(Path(folder))
        yield f'{name} | mapping_node', live(source, Path(folder), 'mapping_node')
        yield f'{name} | localization_node', live(source, Path(folder), 'localization_node')
        yield f'{name} | bag_mapper twice', repeated(source, Path(folder))


def _source(folder: Path) -> tuple[str, Path]:
    """The real walk, or else a rendered one, 640x480 at 15 Hz with depth."""
    try:
        real = data_root() / KITCHEN
    except InputError:
        room = Room.generate(5)
        steps = room.walk(450, seed=0, fps=RATE_HZ)
        frames = render_walk(room, Camera.from_fov(62.0, (640, 480)), steps, fps=RATE_HZ)
        write_bag(folder / 'room', frames, 'mcap', compressed=True)
        return 'synthetic room RGB-D', folder / 'room'
    walk = folder / KITCHEN  # what the player tells as the truth are the poses of cameras.json
    walk.mkdir()
    for name, target in (('images', 'images'), ('depth', 'depth'), ('cameras.json', PRECISE)):
        (walk / name).symlink_to(real / target)
    return f'{KITCHEN} RGB-D', walk


def live(source: Path, folder: Path, module: str, seconds: float = SECONDS, *,
         watch_all: bool = False) -> dict[str, Any]:
    """Play the walk in a loop, each in its own process: camera, node, and this one.

    watch_all: listen to everything that the node can publish, not to poses alone. Otherwise
    mapping_node saves its map in the folder in the end; localization_node loads it from there.
    """
    from ros_support.harness import NodeProcess, own_domain

    from feedforward_recon.ros.camera_topics import CAMERA_TOPICS

    with own_domain('live') as domain:
        os.environ.update(domain.environment)
        node = NodeProcess(domain, folder / 'node.log', module,
                           parameters={'map': folder / 'map', 'fresh': True,
                                       'autosave_s': 0.0},
                           remap=CAMERA_TOPICS)
        player = NodeProcess(domain, folder / 'player.log', 'player_node', parameters={
            'source': source, 'stamps': 'now', 'loop': True})
        try:
            watch, report = _watched(domain, node, seconds, watch_all)
        except AssertionError as error:
            raise InputError(f'{error}: {node.output}{player.output}') from error
        finally:
            for process in (player, node):
                process.kill()
    return _row(watch, report)


def _watched(domain: Any, node: Any, seconds: float, watch_all: bool
             ) -> tuple[Watch, dict[str, str]]:
    """Listen for the length of the run; the diagnostics at its end as {key: value}."""
    from diagnostic_msgs.msg import DiagnosticArray
    from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
    from ros_support.probe import Probe, profile
    from sensor_msgs.msg import CameraInfo
    from std_srvs.srv import Trigger

    from feedforward_recon.ros.camera_topics import CAMERA_TOPICS
    from feedforward_recon.ros.convert import matrix_from_pose, stamp_ns

    watch, reports, probe = Watch(), [], Probe(domain)
    subscribe = probe.node.create_subscription
    subscribe(CameraInfo, CAMERA_TOPICS['camera_info'],
              lambda m: watch.image(stamp_ns(m.header)), profile())
    subscribe(PoseWithCovarianceStamped, '/pose', lambda m: watch.pose(
        stamp_ns(m.header), matrix_from_pose(m.pose.pose)[:3, 3]), profile())
    subscribe(PoseStamped, '/ground_truth', lambda m: watch.true.update(
        {stamp_ns(m.header): matrix_from_pose(m.pose)[:3, 3]}), profile())
    subscribe(DiagnosticArray, '/diagnostics', lambda m: reports.append(
        {pair.key: pair.value for pair in m.status[0].values}), profile())
    if watch_all:
        _watch_all(subscribe)
    try:
        assert probe.spin_until(lambda: watch.poses_ns, START_S), 'no pose came'
        watch.start()
        started = time.monotonic()
        while (passed := time.monotonic() - started) < seconds:
            watch.usage.append((passed, *_usage(node.pid)))
            log.info('%4.0f s %6.1f MB %6.1f CPU s, %s keyframes', *watch.usage[-1],
                     reports[-1]['keyframes'] if reports else 0)
            probe.spin_for(1.0)
        watch.is_over, report = True, reports[-1]  # saving leaves images out, too
        if node.name.endswith('mapping_node') and not watch_all:
            answer = probe.call(Trigger, '/mapping_node/save_map', timeout_s=SAVE_S)
            assert answer.success, answer.message
        return watch, report
    finally:
        probe.close()


def _watch_all(subscribe: Any) -> None:
    """Listen to what costs the node nothing as long as nobody does."""
    from nav_msgs.msg import Odometry, Path
    from ros_support.probe import profile
    from sensor_msgs.msg import PointCloud2
    from visualization_msgs.msg import MarkerArray

    for type_, topic, latched in ((Odometry, '/odometry', False), (Path, '/path', True),
                                  (PointCloud2, '/cloud', False),
                                  (PointCloud2, '/cloud_map', True),
                                  (MarkerArray, '/markers', True)):
        subscribe(type_, topic, lambda _: None, profile(1, latched=latched))


def _usage(pid: int) -> tuple[float, float]:
    """Resident memory in MB and CPU seconds of a process."""
    stat = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()
    ticks, pages = int(stat[11]) + int(stat[12]), int(stat[21])
    return pages * resource.getpagesize() / 1e6, ticks / os.sysconf('SC_CLK_TCK')


def _row(watch: Watch, report: dict[str, str]) -> dict[str, Any]:
    seconds, rss, cpu = np.array(watch.usage).T
    steady = seconds > STEADY * seconds[-1]
    after_a_minute = seconds > 60
    p50, p95, p99 = np.percentile(watch.latency_ms, (50, 95, 99))
    growth = {f'rss_mb_per_minute{name}': 60 * np.polyfit(seconds[rows], rss[rows], 1)[0]
              for name, rows in (('', steady), ('_after_the_first', after_a_minute))
              if rows.sum() > 10}
    return {'seconds': seconds[-1], 'images': len(watch.sent_ns), 'poses': len(watch.poses_ns),
            'hz': len(watch.poses_ns) / seconds[-1],
            'core_share': (cpu[-1] - cpu[0]) / (seconds[-1] - seconds[0]),
            'dropped': int(report['dropped']), 'p50_ms': p50, 'p95_ms': p95, 'p99_ms': p99,
            'max_ms': max(watch.latency_ms), 'waiting': max(watch.waiting),
            'keyframes': int(report['keyframes']), 'ate_m': watch.error_m(),
            'rss_mb': rss[-1], **growth}


def repeated(source: Path, folder: Path) -> dict[str, Any]:
    """Map a bag of the walk twice, in two processes, and compare the trajectories."""
    bag = folder / 'bag'
    frames = open_source(source, SourceOptions(max_frames=REPEATED))
    write_bag(bag, frames, 'mcap', compressed=True)
    hashes = [_bag_mapper(bag, folder / f'map_{index}')['trajectory_sha256']
              for index in range(2)]
    return {'images': len(frames), 'trajectory_sha256': hashes, 'same': hashes[0] == hashes[1]}


def _bag_mapper(bag: Path, out: Path) -> dict[str, Any]:
    words = [sys.executable, '-m', 'feedforward_recon.ros.bag_mapper', '--bag', str(bag),
             '--map', str(out), '--json']
    result = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def main() -> None:
    """One run of one node; its row, and each second on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seconds', type=float, default=SECONDS)
    parser.add_argument('--node', default='mapping_node',
                        choices=('mapping_node', 'localization_node'))
    parser.add_argument('--map', type=Path, help='folder that holds map/, for localization_node')
    parser.add_argument('--poses-only', action='store_true', help='listen to no other output')
    options = parser.parse_args()
    logging.basicConfig(format='%(message)s', level=logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        place = options.map or Path(folder)
        row = live(_source(Path(folder))[1], place, options.node, options.seconds,
                   watch_all=not options.poses_only)
        log.info('%s', json.dumps(row, indent=1, default=float))


if __name__ == '__main__':
    main()
