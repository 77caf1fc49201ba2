"""One camera, no depth sensor: depth of a network becomes a cloud that fits the map."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from feedforward_recon.config.schema import CloudConfig, MapperConfig
from feedforward_recon.geometry.align import align_points
from feedforward_recon.mapping.dense_clouds import DenseClouds
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.session.live import LiveSession
from feedforward_recon.session.offline import map_frames
from feedforward_recon.types import Prediction

WRONG = 0.25  # bend of the depth that the network says


class BentDepth:
    """Says the true depth of images times a unit, and bends it from left to right."""

    def __init__(self, frames, unit=5.0):
        self._of = {frame.image.tobytes(): frame.depth for frame in frames}
        self._unit, self.asked = unit, 0

    def predict(self, images, memory=None, *, write=True, keep=True, K=None):
        self.asked += 1
        depth = np.stack([self.said(self._of[image.tobytes()]) for image in images])
        return Prediction(np.eye(4)[None], K[None], depth, np.ones_like(depth)), None

    def said(self, depth):
        across = np.linspace(-1, 1, depth.shape[1])
        return (self._unit * depth * np.exp(WRONG * np.sin(2 * across))).astype(np.float32)


class Nonsense(BentDepth):
    """Says of each image the depth of no other."""

    def said(self, depth):
        rng = np.random.default_rng(self.asked)
        coarse = np.exp(np.cumsum(rng.normal(0, 0.3, depth.shape[1] // 8)))
        return np.tile(np.repeat(coarse, 8), (len(depth), 1)).astype(np.float32)


def without_depth(frames):
    return [replace(frame, depth=None, T_map_cam=None) for frame in frames]


def mapped(frames, network, encoder):
    """The mapper after a walk, whose frames have no depth."""
    dense = None if network is None else DenseClouds(network, CloudConfig(stride_px=8))
    mapper = Mapper(MapperConfig(), encoder, dense=dense)
    for frame in without_depth(frames):
        mapper.process(frame)
    return mapper


def depth_errors(mapper, frames):
    """|d - d*| / d* of all cloud points of keyframes, in the unit of the trajectory."""
    keyframes = mapper.results.keyframes
    truth = {frame.stamp_ns: frame for frame in frames}
    true = np.stack([truth[k.stamp_ns].T_map_cam[:3, 3] for k in keyframes])
    scale = align_points(np.stack([k.T_map_cam[:3, 3] for k in keyframes]), true,
                         with_scale=True).scale
    errors = []
    for keyframe in mapper._map.keyframes:
        cloud = keyframe.cloud_cam.astype(float)
        px = np.rint(keyframe.camera.project(cloud)).astype(int)
        height, width = truth[keyframe.stamp_ns].depth.shape
        px = np.clip(px, 0, [width - 1, height - 1])
        there = truth[keyframe.stamp_ns].depth[px[:, 1], px[:, 0]]
        errors.append(np.abs(scale * cloud[:, 2] / there - 1))
    return errors


@pytest.fixture(scope='module')
def walked(room_walk, encoder):
    mapper = mapped(room_walk, BentDepth(room_walk), encoder)
    before = [keyframe.cloud_cam.copy() for keyframe in mapper._map.keyframes]
    return mapper, before, mapper.finish()


def test_depth_is_bent_to_the_map(walked, room_walk):
    mapper, _, scene = walked
    errors = depth_errors(mapper, room_walk)
    assert all(len(e) > 300 for e in errors)  # of 1200 that were sampled
    assert np.mean(np.concatenate(errors)) < 0.02 < WRONG / 4
    assert len(scene.cloud) > 1000


def test_keyframes_get_their_clouds_while_the_walk_goes_on(walked):
    _, before, _ = walked
    assert all(len(cloud) for cloud in before[:-6]) and not len(before[-1])


def test_a_finished_map_bends_its_clouds_anew(room_walk, encoder):
    mapper = mapped(room_walk[:40], BentDepth(room_walk), encoder)
    while mapper.work(final=True):
        pass
    map_ = mapper._map
    dense, cloud = mapper._dense, map_.keyframes[0].cloud_cam.copy()
    dense.finish(map_)
    was = map_.keyframes[0].cloud_cam.copy()
    map_.landmarks.point_cam *= 2
    map_.T_map_cam[:, :3, 3] *= 2
    dense.finish(map_)
    assert len(was) >= len(cloud)
    np.testing.assert_allclose(map_.keyframes[0].cloud_cam, 2 * was, rtol=2e-3)


def test_what_keyframes_beside_do_not_confirm_is_no_cloud(room_walk, walked, encoder):
    mapper = mapped(room_walk[:40], Nonsense(room_walk), encoder)
    mapper.finish()
    found, confirmed = (np.mean([len(k.cloud_cam) for k in m._map.keyframes])
                        for m in (mapper, walked[0]))
    assert found < 0.3 * confirmed


def test_a_depth_sensor_is_believed_instead(room_walk, encoder):
    network = BentDepth(room_walk)
    mapper = Mapper(MapperConfig(), encoder, dense=DenseClouds(network, CloudConfig()))
    for frame in room_walk[:20]:
        mapper.process(frame)
    mapper.finish()
    assert network.asked == 0 and len(mapper._map.keyframes[0].cloud_cam)


def test_the_newest_keyframe_shows_its_landmarks_until_its_cloud_is_made(walked):
    mapper = walked[0]
    keyframe = mapper._map.keyframes[-1]
    kept, keyframe.cloud_cam = keyframe.cloud_cam, keyframe.cloud_cam[:0]
    landmarks = mapper.results.cloud_source(newest_only=True).fused()
    keyframe.cloud_cam = kept
    assert 10 < len(landmarks) < len(mapper.results.cloud_source(newest_only=True).fused())


def test_few_images_wait(room_walk, encoder):
    mapper = mapped(room_walk[:40], BentDepth(room_walk), encoder)
    assert len(mapper._dense._waiting) + len(mapper._dense._seen) <= 6
    mapper._start_again(restarts=True)
    assert not mapper._dense.work(mapper._map, final=True)


def test_an_option_of_map_and_nodes(room_walk, encoder, tmp_path):
    """With the network that ships: many points where landmarks are few, offline and live."""
    frames = without_depth(room_walk[:36])
    landmarks = map_frames(frames, MapperConfig(), encoder).scene.cloud
    dense = replace(MapperConfig(), cloud=CloudConfig(dense=True))
    run = map_frames(frames, dense, encoder)
    assert len(run.scene.cloud) > 5 * len(landmarks)
    run.save(tmp_path / 'map')
    later = LiveSession(dense, encoder, 'localization')
    later.load(tmp_path / 'map')
    assert len(later.cloud_source().fused()) == len(run.scene.cloud)
    session = LiveSession(dense, encoder)
    for frame in frames:
        session.process(frame)
    assert len(session.cloud_source().fused()) > 5 * len(landmarks)
