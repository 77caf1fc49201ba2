"""Windows of a feed-forward network, aligned in one map, whatever the network predicts."""

from dataclasses import replace

import numpy as np
import pytest

from feedforward_recon.config.network import WindowConfig
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import ConfigError, InputError, TooManyImagesError
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import make_transform, so3_exp
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.sources.window_geometry import (
    agreement,
    alignments,
    residual,
    samples,
)
from feedforward_recon.mapping.sources.windows import WindowPoses
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.session.map_folder import save_map
from feedforward_recon.session.offline import relocalise_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Prediction, Status, Trajectory

CAMERA = Camera.from_fov(68.0, (160, 120))
FPS = 6.0


class Oracle:
    """Exact poses and depth of known images, in a random frame and unit per call.

    noise: relative error of depth, constant over an image; bend: of its logarithm from the
    middle to the border, of all images of a call; turn: of poses, in radians and metres.
    limit: images that fit into memory.
    """

    def __init__(self, frames, seed=0, noise=0.0, turn=0.0, limit=1000, bend=0.0):
        self.known = {frame.image.tobytes(): frame for frame in frames}
        self.rng = np.random.default_rng(seed)
        self.noise, self.turn, self.limit, self.bend = noise, turn, limit, bend
        self.sizes = []

    def predict(self, images, memory=None, *, write=True, keep=True, K=None):
        if len(images) > self.limit:
            raise MemoryError(f'{len(images)} images')
        self.sizes.append(len(images))
        rng, count = self.rng, len(images)
        frames = [self.known[image.tobytes()] for image in images]
        scale, gauge = rng.uniform(0.2, 5), self.gauge()
        T = np.stack([frame.T_map_cam for frame in frames])
        T = T @ make_transform(so3_exp(self.turn * rng.normal(size=(count, 3))),
                               self.turn * rng.normal(size=(count, 3)))
        T[:, :3, 3] *= scale
        error = 1 + self.noise * rng.normal(size=(count, 1, 1))
        if self.bend:
            side = rng.choice([-self.bend, self.bend])
            error = error * np.exp(side * np.linspace(-1, 1, CAMERA.width))
        depth = np.stack([frame.depth for frame in frames]) * scale * error
        return Prediction(gauge @ T, np.repeat(CAMERA.K[None], count, 0),
                          depth.astype(np.float32), np.full_like(depth, 2, np.float32)), memory

    def gauge(self):
        return make_transform(so3_exp(self.rng.normal(size=3)), 10 * self.rng.normal(size=3))


class MemoryLog:
    """A memory that records what is written to it."""

    def __init__(self):
        self.written = []

    def write(self, keyframe):
        self.written.append(keyframe)

    def reanchor(self, poses):
        pass

    def correct(self, keyframe):
        pass


@pytest.fixture(scope='module')
def frames():
    """Thirty frames of a walk with camera, true depth and true poses."""
    room = Room.generate(7)
    return list(render_walk(room, CAMERA, room.walk(90, seed=0, fps=FPS)[:30], fps=FPS))


@pytest.fixture(scope='module')
def elsewhere():
    room = Room.generate(11)
    return list(render_walk(room, CAMERA, room.walk(90, seed=0, fps=FPS)[:8], fps=FPS))


def without(frames, **changes):
    return [replace(frame, **changes) for frame in frames]


def mapped(frames, encoder, oracle, size=10, anchors=3, memory=None, depth=False, refine=False):
    """A finished reconstruction; truth stays with the oracle."""
    shown = without(frames, T_map_cam=None, **({} if depth else {'depth': None}))
    source = WindowPoses(MapperConfig(), oracle, encoder, windows=WindowConfig(size, anchors),
                         refine=refine)
    mapper = Mapper(MapperConfig(), encoder, memory, source=source)
    for frame in shown:
        mapper.process(frame)
    mapper.finish()
    if refine:
        relocalise_frames(mapper, shown)
    return mapper.results.scene_map()


def error(scene, frames, alignment='sim3'):
    truth = Trajectory(np.array([frame.stamp_ns for frame in frames]),
                       np.stack([frame.T_map_cam for frame in frames]))
    return absolute_trajectory_error(scene.trajectory, truth, alignment)


def test_an_exact_predictor_gives_the_walk_up_to_one_similarity(frames, encoder):
    scene = mapped(frames, encoder, Oracle(frames))
    result = error(scene, frames)
    assert len(scene.trajectory) == len(frames)
    assert result.rmse < 1e-5 and result.path_length > 1
    assert result.rotation_median_deg < 1e-3


def test_the_frame_and_unit_of_a_window_change_nothing(frames, encoder):
    a, b = (mapped(frames, encoder, Oracle(frames, seed)) for seed in (1, 2))
    np.testing.assert_allclose(a.trajectory.T_map_cam, b.trajectory.T_map_cam, atol=1e-6)


def test_the_map_starts_at_the_first_camera_and_has_no_metres(frames, encoder):
    memory = MemoryLog()
    scene = mapped(frames, encoder, Oracle(frames), memory=memory)
    np.testing.assert_allclose(scene.trajectory.T_map_cam[0], np.eye(4), atol=1e-9)
    assert (scene.metres_per_unit, scene.scale_source) == (None, 'unknown')
    assert (scene.frame, scene.camera_source) == ('first camera', 'given')
    assert len(memory.written) == len(scene.keyframes) > 3
    assert all(keyframe.has_point.sum() > 50 for keyframe in memory.written)
    assert len(scene.cloud) > 1000
    assert np.median(np.linalg.norm(scene.cloud.xyz, axis=1)) == pytest.approx(1, rel=0.6)


def test_sensor_depth_gives_metres(frames, encoder):
    scene = mapped(frames, encoder, Oracle(frames), depth=True)
    assert (scene.metres_per_unit, scene.scale_source) == (1.0, 'depth')
    assert error(scene, frames, 'se3').rmse < 1e-4


def test_sensor_depth_is_kept_where_the_network_is_off(frames, encoder):
    memory = MemoryLog()
    mapped(frames, encoder, Oracle(frames, noise=0.1), memory=memory, depth=True)
    by_stamp = {frame.stamp_ns: frame.depth for frame in frames}
    for keyframe in memory.written:
        u, v = np.rint(keyframe.features.keypoints[keyframe.has_point]).astype(int).T
        ratio = keyframe.points_cam[keyframe.has_point, 2] / by_stamp[keyframe.stamp_ns][v, u]
        assert np.median(np.abs(ratio - 1)) < 0.01


def test_an_image_that_no_other_confirms_has_a_low_score(frames):
    prediction, _ = Oracle(frames).predict([frame.image for frame in frames[:4]])
    assert agreement(prediction).score.min() > 0.9
    prediction.depth[2] *= 1.4
    assert agreement(prediction).score[2] < 0.2


def test_a_camera_without_intrinsics_is_the_one_the_network_sees(frames, encoder):
    scene = mapped(without(frames, camera=None), encoder, Oracle(frames))
    assert scene.camera_source == 'predicted'
    assert scene.keyframes[0].camera.fx == pytest.approx(CAMERA.fx)


def test_noise_stays_small_for_every_size_of_window(frames, encoder):
    rmse = [error(mapped(frames, encoder, Oracle(frames, 3, noise=0.01, turn=0.003), size),
                  frames).rmse for size in (6, 12, 40)]
    assert max(rmse) < 0.06


def test_depth_that_is_bent_over_whole_windows_does_not_turn_them(frames, encoder):
    found = mapped(frames, encoder, Oracle(frames, bend=0.06))
    assert error(found, frames).rmse < 0.01
    assert error(found, frames).rotation_median_deg < 0.5


def test_one_wrong_camera_does_not_lose_a_window(frames):
    """The points of the others say where it belongs: the second alignment."""
    oracle = Oracle(frames)
    shown = [frame.image for frame in frames[:4]]
    source, there = (oracle.predict(shown)[0] for _ in range(2))
    turned = source.T_world_cam.copy()
    turned[3] = turned[3] @ make_transform(so3_exp(np.array([0.0, 0.7, 0.0])), np.array([1, 0, 0]))
    by_cameras, by_points = alignments(replace(source, T_world_cam=turned), there.T_world_cam,
                                       samples(there), with_scale=True)
    assert residual(by_points, samples(there)) < 0.01 < residual(by_cameras, samples(there))
    for exact in alignments(source, there.T_world_cam, samples(there), with_scale=True):
        assert residual(exact, samples(there)) < 1e-5


def test_refinement_helps_where_the_network_is_far_off(frames, encoder):
    raw, refined = (mapped(frames, encoder, Oracle(frames, 3, noise=0.05, turn=0.02), 12,
                           refine=refine) for refine in (False, True))
    assert error(refined, frames).rmse < 0.9 * error(raw, frames).rmse
    assert len(refined.trajectory) == len(frames)


def test_refinement_keeps_an_exact_walk(frames, encoder):
    scene = mapped(frames, encoder, Oracle(frames), refine=True)
    assert error(scene, frames).rmse < 0.03
    assert (scene.metres_per_unit, scene.scale_source) == (None, 'unknown')


def test_covariances_cover_the_errors(frames, encoder):
    scene = mapped(frames, encoder, Oracle(frames, 5, noise=0.01, turn=0.005))
    fit = error(scene, frames)
    sigma = np.array([np.sqrt(e.covariance[0, 0]) for e in scene.estimates]) * fit.scale
    assert np.all(np.diff(sigma) >= 0)
    assert fit.rmse < 3 * sigma.mean() and sigma.mean() < 0.3


@pytest.mark.parametrize('limit', [9, 5, 2])
def test_out_of_memory_means_smaller_windows_and_the_same_map(frames, encoder, limit, caplog):
    oracle = Oracle(frames, limit=limit)
    scene = mapped(frames, encoder, oracle, size=16)
    assert max(oracle.sizes) <= limit and 'out of memory' in caplog.text
    assert len(scene.trajectory) == len(frames)
    assert error(scene, frames).rmse < 1e-5


class Short(Oracle):
    """An oracle that says how many images it has room for."""

    def predict(self, images, *given, **how):
        if len(images) > self.limit:
            raise TooManyImagesError(f'{len(images)} images need 9 GB', self.limit)
        return super().predict(images, *given, **how)


def test_foreseen_windows_are_as_large_as_fits_after_one_sentence(frames, encoder, caplog):
    oracle = Short(frames, limit=7)
    scene = mapped(frames, encoder, oracle, size=16)
    assert max(oracle.sizes) == 7 and caplog.text.count('going on with windows of 7') == 1
    assert len(scene.trajectory) == len(frames)
    assert error(scene, frames).rmse < 1e-5
    with pytest.raises(InputError, match=r'found less \(10 images need 9 GB\); use smaller'):
        mapped(frames, encoder, Short(frames, limit=1))


def test_half_a_window_has_half_the_anchors():
    assert WindowConfig(16, 12).of_size(8) == WindowConfig(8, 4)
    assert WindowConfig(3, 2).of_size(1) == WindowConfig(2, 1)


def test_no_room_for_two_images_is_an_error(frames, encoder):
    with pytest.raises(InputError, match='enough memory for two images'):
        mapped(frames, encoder, Oracle(frames, limit=1))


def test_frames_from_elsewhere_are_lost_and_what_follows_is_not(frames, elsewhere, encoder):
    walk = frames[:12] + [replace(f, stamp_ns=f.stamp_ns + 10**12) for f in elsewhere] \
        + [replace(f, stamp_ns=f.stamp_ns + 10**13) for f in frames[12:]]
    apart = np.diag([1.0, 1, 1, 1])
    apart[0, 3] = 100
    known = Oracle(frames + [replace(f, T_map_cam=apart @ f.T_map_cam) for f in elsewhere])
    scene = mapped(walk, encoder, known, size=10)
    status = [estimate.status for estimate in scene.estimates]
    assert status[12:20] == [Status.LOST] * 8
    assert scene.estimates[12].reason == 'no overlap with the map'
    assert all(s.has_pose for s in status[:12] + status[20:])


def test_images_that_share_nothing_start_no_map(frames, encoder):
    apart = [replace(f, T_map_cam=make_transform(np.eye(3), [100.0 * i, 0, 0]))
             for i, f in enumerate(frames[:4])]
    scene = mapped(apart, encoder, Oracle(apart), size=4)
    assert not scene.keyframes and not len(scene.trajectory)
    assert [e.status for e in scene.estimates] == [Status.INITIALISING] * 4


def test_images_of_two_sizes_are_refused(frames, encoder):
    odd = replace(frames[1], image=frames[1].image[:100])
    with pytest.raises(InputError, match='expected images of 160x120'):
        mapped([frames[0], odd], encoder, Oracle(frames))


@pytest.mark.parametrize(('size', 'anchors'), [(1, 1), (4, 4), (4, 0)])
def test_windows_without_anchors_or_news_are_refused(size, anchors):
    with pytest.raises(ConfigError, match='expected windows'):
        WindowConfig(size, anchors)


def test_views_are_found_in_a_windowed_map_as_in_any_other(frames, encoder, tmp_path):
    """Every other frame maps, the others are looked for in what was saved."""
    config = MapperConfig()
    writer = MemoryWriter(config.memory, encoder.dim)
    scene = mapped(frames[::2], encoder, Oracle(frames), memory=writer)
    saved = save_map(tmp_path / 'map', scene, writer, encoder, config)
    assert saved.info.metres_per_unit is None
    localizer = saved.localizer(encoder)
    found = [localizer.localize(replace(frame, depth=None, T_map_cam=None))
             for frame in frames[1::2]]
    posed = [(e, f) for e, f in zip(found, frames[1::2], strict=True) if e.T_map_cam is not None]
    assert len(posed) > 0.8 * len(found)
    scale = error(scene, frames).scale
    T_room_map = frames[0].T_map_cam
    off = [np.linalg.norm(T_room_map[:3, :3] @ e.T_map_cam[:3, 3] * scale + T_room_map[:3, 3]
                          - f.T_map_cam[:3, 3]) for e, f in posed]
    assert np.median(off) < 0.03
