"""Following a camera in a frozen memory: as accurate and as strict as localising each image."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import make_transform, pose_error, transform_points
from feedforward_recon.localization import follower as following
from feedforward_recon.localization.follower import MAX_CONTRADICTIONS, Follower
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.sources import GivenPoses
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Status

BASE = MapperConfig()
CONFIG = replace(BASE, memory=replace(BASE.memory, slots=8000, cells=2000, samples=20_000))
STEP_NS = 100_000_000


@pytest.fixture(scope='module')
def memory(room_walk, encoder):
    """Every other image of the walk, mapped in the frame of the truth."""
    writer = MemoryWriter(CONFIG.memory, encoder.dim)
    mapper = Mapper(CONFIG, encoder, writer, source=GivenPoses(CONFIG, encoder))
    for frame in room_walk[::2]:
        mapper.process(frame)
    mapper.finish()
    return writer.snapshot()


@pytest.fixture(scope='module')
def elsewhere():
    room, camera = Room.generate(11), Camera.from_fov(68.0, (320, 240))
    return list(render_walk(room, camera, room.walk(120, seed=0, fps=10.0)[:8], fps=10.0))


class Counted(Localizer):
    """Counts the queries; answers, points and pose, are off by ``T_wrong`` where it is set."""

    queries = 0
    T_wrong = None

    def localize_features(self, features, camera, T_map_cam_hint=None):
        self.queries += 1
        found = super().localize_features(features, camera, T_map_cam_hint)
        if self.T_wrong is None:
            return found
        estimate = replace(found.estimate, T_map_cam=self.T_wrong @ found.estimate.T_map_cam)
        points = transform_points(self.T_wrong, found.matches.points)
        return replace(found, estimate=estimate, matches=replace(found.matches, points=points))


@pytest.fixture
def follower(memory, encoder, room_walk):
    return Follower(Counted(memory, encoder, CONFIG.localizer, room_walk[0].camera),
                    CONFIG.tracking)


def stream(follower, frames, start=0):
    """Answers to frames that come one after another, with the work between them done."""
    answers = []
    for index, frame in enumerate(frames, start):
        plain = replace(frame, stamp_ns=index * STEP_NS, depth=None, T_map_cam=None)
        answers.append(follower.process(plain))
        while follower.work():
            pass
    return answers


def errors_m(answers, frames):
    return np.array([pose_error(a.T_map_cam[None], f.T_map_cam[None])[0][0]
                     for a, f in zip(answers, frames, strict=True)])


def test_each_image_has_a_pose_and_the_memory_is_queried_rarely(follower, room_walk, memory):
    before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    frames = room_walk[:60]
    answers = stream(follower, frames)
    assert all(a.status.has_pose for a in answers)
    followed = errors_m(answers, frames)
    each = errors_m([follower.localizer.localize(f) for f in frames], frames)
    assert np.median(followed) < np.median(each) + 0.005 and followed.max() < 0.05
    assert follower.localizer.queries - len(frames) <= len(frames) // 3
    assert all(np.array_equal(before[name], t) for name, t in memory.tensors().items())


def test_a_followed_pose_says_how_sure_it_is(follower, room_walk):
    second = stream(follower, room_walk[20:22])[1]
    assert second.status is Status.TRACKING and 0.5 < second.score <= 1.0
    assert np.all(np.linalg.eigvalsh(second.covariance) > 0)
    assert second.stamp_ns == STEP_NS and second.source == room_walk[21].source
    assert second.inliers >= 2 * CONFIG.tracking.min_inliers


def test_without_following_poses_are_those_of_the_localizer(memory, encoder, room_walk):
    config = replace(CONFIG.localizer, followed_images=0)
    localizer = Localizer(memory, encoder, config, room_walk[0].camera)
    answers = stream(Follower(localizer, CONFIG.tracking), room_walk[30:34])
    for answer, frame in zip(answers, room_walk[30:34], strict=True):
        np.testing.assert_array_equal(answer.T_map_cam, localizer.localize(frame).T_map_cam)


@pytest.mark.parametrize('cover', ['black', 'noise', 'dim noise'])
def test_a_covered_camera_has_no_pose_and_is_relocalised(follower, room_walk, cover):
    rng = np.random.default_rng(0)
    image = {'black': np.zeros((240, 320, 3)), 'noise': rng.uniform(0, 255, (240, 320, 3)),
             'dim noise': np.abs(rng.normal(0, 4, (240, 320, 3)))}[cover].astype(np.uint8)
    covered = [replace(room_walk[13], image=image)] * 3
    answers = stream(follower, room_walk[10:13] + covered + room_walk[13:15])
    assert [a.status.has_pose for a in answers] == [True] * 3 + [False] * 3 + [True] * 2
    assert all(a.T_map_cam is None and a.reason for a in answers[3:6])


def test_another_room_never_has_a_pose(follower, room_walk, elsewhere):
    answers = stream(follower, room_walk[10:13] + elsewhere)
    assert all(a.status is Status.NOT_LOCALISED and a.T_map_cam is None for a in answers[3:])


def test_a_jump_to_another_place_of_the_map_is_answered_at_once(follower, room_walk):
    frames = room_walk[5:9] + room_walk[60:64] + room_walk[30:34]
    answers = stream(follower, frames)
    assert all(a.status.has_pose for a in answers)
    assert errors_m(answers, frames).max() < 0.05


def test_what_the_memory_contradicts_is_uncertain_and_then_dropped(follower, room_walk):
    localizer = follower.localizer
    localizer.config = replace(CONFIG.localizer, followed_images=1)  # each image is checked
    localizer.T_wrong = make_transform(np.eye(3), [0.5, 0.5, 0.5])
    before = stream(follower, room_walk[10:12])
    assert errors_m(before, room_walk[10:12]).min() > 0.5
    localizer.T_wrong = None
    answers = stream(follower, room_walk[12:14 + MAX_CONTRADICTIONS], start=2)
    assert {a.status for a in answers[1:MAX_CONTRADICTIONS]} == {Status.UNCERTAIN}
    assert errors_m(answers[-1:], [room_walk[13 + MAX_CONTRADICTIONS]])[0] < 0.05


def test_a_busy_node_queries_the_memory_all_the_same(follower, room_walk):
    """Where images come so fast that no time is left between them, one of them waits."""
    config = replace(CONFIG.localizer, followed_images=3)
    follower.localizer.config = config
    for index, frame in enumerate(room_walk[10:40]):
        follower.process(replace(frame, stamp_ns=index * STEP_NS))
    assert 2 <= follower.localizer.queries <= 12


def test_images_that_come_while_the_memory_is_being_queried(follower, room_walk, monkeypatch):
    """One piece of work between two images: answers are about an earlier image than the newest.

    Flow starts in the image just before, whatever the answers that came meanwhile are about.
    """
    frames, answers, started = room_walk[::3], [], []  # a camera that moves fast
    flow = following.follow
    monkeypatch.setattr(following, 'follow', lambda tracks, *arguments: started.append(
        tracks.gray) or flow(tracks, *arguments))
    for index, frame in enumerate(frames):
        started.clear()
        answers.append(follower.process(replace(frame, stamp_ns=index * STEP_NS)))
        assert bool(started) == (index > 0)
        if started:
            before = cv2.cvtColor(frames[index - 1].image, cv2.COLOR_RGB2GRAY)
            np.testing.assert_array_equal(started[0], before)
        follower.work()
    assert all(a.status is Status.TRACKING for a in answers)
    assert errors_m(answers, frames).max() < 0.05
    assert 3 <= follower.localizer.queries <= len(frames) // 3


def test_images_of_another_size_and_stamps_that_go_back(follower, room_walk):
    small = [replace(f, image=cv2.resize(f.image, (240, 180), interpolation=cv2.INTER_AREA),
                     camera=f.camera.resized((240, 180)), depth=None) for f in room_walk[12:15]]
    frames = room_walk[10:12] + small
    assert errors_m(stream(follower, frames), frames).max() < 0.05
    again = stream(follower, room_walk[11:13], start=-400)
    assert errors_m(again, room_walk[11:13]).max() < 0.05


def test_an_image_that_is_none_is_refused_and_the_next_goes_on(follower, room_walk):
    stream(follower, room_walk[10:12])
    with pytest.raises(InputError, match='RGB'):
        follower.process(replace(room_walk[12], image=np.zeros((240, 320), np.uint8)))
    queries = follower.localizer.queries
    assert stream(follower, room_walk[12:13], start=2)[0].status.has_pose
    assert follower.localizer.queries == queries


def test_a_few_points_that_survive_do_not_speak_for_the_camera(follower, room_walk, elsewhere):
    """A ninth of them agrees perfectly with the last pose, all around is another room."""
    stream(follower, room_walk[10:13])
    queries, image = follower.localizer.queries, elsewhere[0].image.copy()
    image[60:180, 100:220] = room_walk[12].image[60:180, 100:220]
    follower.process(replace(room_walk[12], image=image, stamp_ns=3 * STEP_NS))
    assert follower.localizer.queries == queries + 1
