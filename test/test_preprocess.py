"""Resizing a frame keeps image, depth and camera in step."""

from dataclasses import replace

import numpy as np
import pytest

from feedforward_recon.preprocess import resized_frame


@pytest.mark.parametrize('long_side', [80, 100, 53])
def test_depth_and_camera_follow_the_image(room_frames, long_side):
    """Points of the small frame lie on the surfaces of the large one."""
    frame = room_frames[0]
    small = resized_frame(frame, long_side)
    assert max(small.image.shape) == long_side
    assert small.depth.shape == small.image.shape[:2] == small.camera.size_wh[::-1]
    v, u = np.mgrid[:small.depth.shape[0], :small.depth.shape[1]]
    points = small.camera.unproject(np.c_[u.ravel(), v.ravel()], small.depth.ravel())
    pixels = frame.camera.project(points)
    # At even scales the point lies between four pixels; any of their depths is right.
    corners = [np.clip(edge(pixels + shift).astype(int), 0, (159, 119))
               for edge, shift in ((np.floor, 1e-6), (np.ceil, -1e-6))]
    around = [frame.depth[row[:, 1], column[:, 0]] for row in corners for column in corners]
    inside = (points[:, 2] >= np.min(around, 0)) & (points[:, 2] <= np.max(around, 0))
    assert inside.mean() > 0.999
    assert set(np.unique(small.depth)) <= set(np.unique(frame.depth))


def test_small_frames_and_missing_parts_stay(room_frames):
    assert resized_frame(room_frames[0], 160) is room_frames[0]
    bare = resized_frame(replace(room_frames[0], depth=None, camera=None), 80)
    assert bare.depth is None
    assert bare.camera is None
    assert bare.image.shape == (60, 80, 3)
