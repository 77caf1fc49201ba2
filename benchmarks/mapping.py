"""Trajectories of real walks beside those of ORB-SLAM3 in the same run, each walk in four ways.

    python -m benchmarks.run_all mapping

prints for each case a row of this package, one of ORB-SLAM3, and the ratios of both; without
ORB-SLAM3 (`make peers`) its rows are left out with a sentence. Both get the same images from
memory, this package as fast as it takes them, ORB-SLAM3 at the pace of the camera, which its
threads are made for. Finished walks are kept in out/ until the whole table is done, so that a
run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import orbslam_peer, ours
from benchmarks.common import (
    DRIVE,
    KITCHEN,
    REPOSITORY,
    four_ways,
    load_frames,
    package_state,
    true_trajectory,
    with_lens,
)
from benchmarks.peers_environment import why_no_orbslam
from benchmarks.scoring import Row, Walked, interleaved_split, mean_entry, ratios, walk_entry
from feedforward_recon.types import Frame

OURS, PEER = 'feedforward_recon', 'ORB-SLAM3'
RATIOS = f'{OURS} / {PEER}'
KEPT = REPOSITORY / 'out' / 'benchmarks' / 'mapping'
log = logging.getLogger(__name__)
System = Callable[[list[Frame]], Walked | None]


@dataclass(frozen=True)
class Case:
    """Walks by name that are mapped, what is aligned, and who maps them."""

    walks: dict[str, list[Frame]]
    alignment: str
    systems: dict[str, System]


def cases() -> dict[str, Case]:
    """All cases of the table."""
    reason = why_no_orbslam()
    if reason:
        log.warning('ORB-SLAM3 is left out: %s', reason)
    # Its keyframes tell where refined poses are compared, so it comes first.
    both: dict[str, System] = {} if reason else {PEER: orbslam_peer.map_walk}
    both[OURS] = ours.map_walk
    in_stereo = {**both, **({} if reason else {PEER: with_right_images})}
    kitchen = load_frames(KITCHEN)
    no_depth = [replace(frame, depth=None) for frame in kitchen]
    gaps, _ = interleaved_split(len(kitchen))
    drive, pairs = load_frames(DRIVE, use_depth=False), load_frames(DRIVE)
    found = {
        f'{KITCHEN} RGB-D': Case(four_ways(kitchen), 'se3', both),
        f'{KITCHEN} monocular': Case(four_ways(no_depth), 'sim3', both),
        f'{KITCHEN} RGB-D, lens given': Case(four_ways(with_lens(kitchen)), 'se3', both),
        f'{KITCHEN} monocular, lens given': Case(four_ways(with_lens(no_depth)), 'sim3', both),
        f'{KITCHEN} RGB-D, gaps of 25 frames': Case(
            {'forwards': [kitchen[i] for i in gaps]}, 'se3', both),
        f'{KITCHEN} monocular, gaps of 25 frames': Case(
            {'forwards': [no_depth[i] for i in gaps]}, 'sim3', both),
        f'{DRIVE} monocular': Case({'forwards': drive}, 'sim3', both),
        f'{DRIVE} stereo': Case(four_ways(pairs), 'se3', in_stereo)}
    return found


def with_right_images(frames: list[Frame]) -> Walked | None:
    """ORB-SLAM3 with both cameras of a rectified pair."""
    rights = [frame.right for frame in frames if frame.right is not None]
    assert len(rights) == len(frames)
    return orbslam_peer.map_walk(frames, [right.image for right in rights],
                                 float(rights[0].T_left_right[0, 3]))


def run() -> Iterator[tuple[str, Row]]:
    """Rows of each case: each system, then the ratios of both."""
    for name, case in cases().items():
        rows: dict[str, dict[str, Row]] = {system: {} for system in case.systems}
        for way, frames in case.walks.items():  # both close together: the machine is shared
            moments_ns = np.zeros(0, np.int64)
            for system in case.systems:
                label = f'{name}, {way} | {system}'
                found = _kept(label) or _measured(case, system, frames, moments_ns)
                if found is not None:
                    _keep(label, found)
                    rows[system][way] = found['row']
                    moments_ns = np.array(found['keyframes_ns'], np.int64)
                    log.info('%s | %s', label, found['row'])
        means = {system: mean_entry(rows[system]) for system in (OURS, PEER) if rows.get(system)}
        for system, mean in means.items():
            yield f'{name} | {system}', mean
        if OURS in means and PEER in means:
            yield f'{name} | {RATIOS}', compared(rows[OURS], rows[PEER])
    shutil.rmtree(KEPT, ignore_errors=True)


def compared(mine: dict[str, Row], theirs: dict[str, Row]) -> Row:
    """Ratios of the means over the walks {way: row} that both have ended."""
    ways = [way for way in mine if way in theirs]
    means = [mean_entry({way: rows[way] for way in ways}) for rows in (mine, theirs)]
    return {'walks': len(ways), 'ratios': ratios(*means)}


def _measured(case: Case, system: str, frames: list[Frame], moments_ns: np.ndarray
              ) -> dict[str, Any] | None:
    """Row of one walk, and the stamps of the keyframes; None when the system crashed."""
    walked = case.systems[system](frames)
    if walked is None:
        return None
    row = walk_entry(walked, true_trajectory(frames), case.alignment, len(frames),
                     walked.keyframes_ns if system == PEER else moments_ns)
    return {'row': row, 'keyframes_ns': walked.keyframes_ns.tolist()}


def _keep(label: str, found: dict[str, Any]) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    content = json.dumps({'package': package_state(), **found})
    _file(label).write_text(content, encoding='utf-8')


def _kept(label: str) -> dict[str, Any] | None:
    """What an interrupted run has measured, if the package is still the same."""
    if not _file(label).exists():
        return None
    found = json.loads(_file(label).read_text(encoding='utf-8'))
    return found if found['package'] == package_state() else None


def _file(label: str) -> Path:
    return KEPT / (''.join(c if c.isalnum() else '-' for c in label) + '.json')
