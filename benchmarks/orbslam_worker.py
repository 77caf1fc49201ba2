"""Runs in the environment of ORB-SLAM3, without this package; orbslam_peer.py starts it.

    python orbslam_worker.py FOLDER

FOLDER holds job.json, settings.yaml, images.npy (gray, [N, H, W]) and right.npy or depth.npy
(metres). Images are fed at the pace of the camera: mapping runs in threads beside tracking, and
gets the time that it would get on a robot. Written: live.npy (poses T_map_cam [N, 4, 4] as
tracking returned them, NaN where it had none), keyframes.tum, trajectory.tum (not monocular),
and result.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyorbslam3


def main(folder: Path) -> None:
    """Feed the walk and write what came out."""
    job = json.loads((folder / 'job.json').read_text(encoding='utf-8'))
    arrays = [np.load(folder / name, mmap_mode='r') for name in job['inputs']]
    slam = pyorbslam3.Slam(job['vocabulary'], str(folder / 'settings.yaml'),
                           getattr(pyorbslam3.Sensor, job['sensor']))
    track = {'MONOCULAR': slam.track_monocular, 'RGBD': slam.track_rgbd,
             'STEREO': slam.track_stereo}[job['sensor']]
    live = np.full((len(job['seconds']), 4, 4), np.nan)
    latency_s = []
    started, cpu_s = time.perf_counter(), time.process_time()
    for index, seconds in enumerate(job['seconds']):
        images = [np.ascontiguousarray(array[index]) for array in arrays]
        time.sleep(max(0.0, started + seconds - job['seconds'][0] - time.perf_counter()))
        before = time.perf_counter()
        result = track(*images, seconds)
        latency_s.append(time.perf_counter() - before)
        if result.pose_valid:
            live[index] = result.pose_wc
    slam.shutdown()
    cpu_s = time.process_time() - cpu_s
    np.save(folder / 'live.npy', live)
    slam.save_keyframe_trajectory_tum(str(folder / 'keyframes.tum'))
    if job['sensor'] != 'MONOCULAR':
        slam.save_trajectory_tum(str(folder / 'trajectory.tum'))
    (folder / 'result.json').write_text(json.dumps({
        'seconds': time.perf_counter() - started, 'cpu_seconds': cpu_s,
        'latency_s': latency_s}), encoding='utf-8')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
