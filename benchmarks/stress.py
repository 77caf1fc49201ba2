"""Hard rendered walks with exact truth, beside ORB-SLAM3 in the same run.

    python -m benchmarks.run_all stress

Each case of ``synthetic.stress`` in several rooms, with depth and without. A false pose is one
that a system vouches for (status TRACKING; of ORB-SLAM3 every pose) and that is more than 20 cm
off. Poses are counted after the alignment on which most of them agree, so that a false stretch
cannot hide behind an alignment that it pulled towards itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from benchmarks import orbslam_peer, ours
from benchmarks.common import true_trajectory
from benchmarks.peers_environment import why_no_orbslam
from benchmarks.scoring import Row, Walked, mean_entry, trajectory_error
from feedforward_recon.errors import DegenerateError
from feedforward_recon.evaluation import distances_by_consensus
from feedforward_recon.synthetic.stress import CASES, stress_walk
from feedforward_recon.types import Frame, Trajectory

SEEDS = (0, 1, 2, 3)
FALSE_M = 0.2
ALIGNMENTS = {'RGB-D': 'se3', 'monocular': 'sim3'}
log = logging.getLogger(__name__)


def run() -> Iterator[tuple[str, Row]]:
    """Rows of each case: this package, then ORB-SLAM3."""
    reason = why_no_orbslam()
    if reason:
        log.warning('ORB-SLAM3 is left out: %s', reason)
    systems = {'feedforward_recon': ours.map_walk,
               **({} if reason else {'ORB-SLAM3': orbslam_peer.map_walk})}
    for case in CASES:
        rows: dict[tuple[str, str], dict[str, Row]] = {}
        for seed in SEEDS:
            frames = stress_walk(case, seed)
            for sensor in ALIGNMENTS:
                seen = frames if sensor == 'RGB-D' else [replace(f, depth=None) for f in frames]
                for name, system in systems.items():
                    row = entry(system(seen), seen, ALIGNMENTS[sensor])
                    rows.setdefault((sensor, name), {})[str(seed)] = row
                    log.info('%s %s %d | %s | %s', case, sensor, seed, name, row)
        for (sensor, name), each in rows.items():
            yield f'{case} {sensor} | {name}', mean_entry(each)


def entry(walked: Walked | None, frames: list[Frame], alignment: str) -> Row:
    """Row of one walk; one that a system did not survive has no poses."""
    truth = true_trajectory(frames)
    if walked is None:
        walked = Walked(Trajectory(), Trajectory(), Trajectory(), np.zeros(0, np.int64), 0.0, 0.0)
    return {'alignment': alignment, 'images': len(frames), 'tracked_live': len(walked.live),
            'tracked': len(walked.trajectory),
            'unsure_live': len(walked.unsure_live), 'unsure': len(walked.unsure),
            'false_live': false_poses(walked.live, walked.unsure_live, truth, alignment),
            'false': false_poses(walked.trajectory, walked.unsure, truth, alignment),
            'cpu_seconds': walked.cpu_seconds,
            'error': trajectory_error(walked.trajectory, truth, alignment),
            'live_error': trajectory_error(walked.live, truth, alignment)}


def false_poses(estimated: Trajectory, unsure_ns: np.ndarray, truth: Trajectory,
                alignment: str) -> int:
    """How many poses are vouched for and more than ``FALSE_M`` off."""
    sure = ~np.isin(estimated.stamps_ns, unsure_ns)
    if len(estimated) < 3:  # aligned exactly
        return 0
    try:
        matched, distance = distances_by_consensus(
            estimated, truth, with_scale=alignment == 'sim3', tolerance=FALSE_M / 2)
    except DegenerateError:  # all in one place, or hardly any is finite
        return int(sure.sum())
    return int((~np.isin(matched.stamps_ns, unsure_ns) & ~(distance <= FALSE_M)).sum())
