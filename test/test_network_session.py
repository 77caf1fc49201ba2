"""A session that maps with a network and asks its own memory: the shipped ``tiny-ttt``."""

import shutil
from dataclasses import replace

import pytest

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.errors import ConfigError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error
from feedforward_recon.localization.scene_network import NetworkMemory
from feedforward_recon.session.live import session_of
from feedforward_recon.session.map_folder import NETWORK
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Estimate, Status

# A room that this small network finds its way in, roughly (docs/experiments.md).
SEED, NEAR_M, NEAR_DEG = 7, 0.7, 15.0
CAMERA, FPS = Camera.from_fov(70.0, (320, 240)), 10.0
CONFIG = NodeConfig(model='tiny-ttt', window=8, anchors=2)


@pytest.fixture(scope='module')
def frames():
    room = Room.generate(SEED)
    return list(render_walk(room, CAMERA, room.walk(240, seed=0, fps=FPS)[:45], fps=FPS,
                            noise=1.0, seed=1))


@pytest.fixture(scope='module')
def session(frames):
    """A walk that was mapped; tests leave it as it is."""
    made = session_of(replace(CONFIG, localize_with='network'))
    for frame in frames:
        made.process(replace(frame, T_map_cam=None), frames[0].T_map_cam)
    return made


@pytest.fixture(scope='module')
def drafted(session, tmp_path_factory):
    """An autosave."""
    return session.autosave(tmp_path_factory.mktemp('maps') / 'draft')()


@pytest.fixture(scope='module')
def saved(session, drafted, tmp_path_factory):
    return session.save(tmp_path_factory.mktemp('maps') / 'map')()


def shown(frame):
    return replace(frame, T_map_cam=None, depth=None)


def assert_near(T_map_cam, frame):
    metres, degrees = pose_error(T_map_cam, frame.T_map_cam)
    assert metres < NEAR_M and degrees < NEAR_DEG


def test_an_autosave_leaves_out_what_the_network_would_write(drafted):
    assert NETWORK not in drafted.info.files


def test_a_saved_map_holds_what_the_network_wrote(saved):
    written = saved.fast_weights()
    assert (written.model, written.attention) == ('tiny-ttt', 'ttt')
    assert written.link.recognised and written.link.checked > 0


def test_a_frozen_map_is_asked_and_a_growing_one_is_not(session, frames):
    assert session.info.asked == 'landmarks'
    session.set_localization(True)
    assert session.info.asked == 'network'
    for frame in frames[8:40:8]:
        answer = session.locate(shown(frame))
        assert answer.status is Status.UNCERTAIN
        assert_near(answer.T_map_cam, frame)
    session.set_localization(False)
    assert session.info.asked == 'landmarks'


def test_what_is_asked_follows_the_settings(frames, saved, monkeypatch):
    asked = {choice: session_of(replace(CONFIG, mode='localization', map=str(saved.path),
                                        localize_with=choice))
             for choice in ('auto', 'landmarks', 'network')}
    assert [session.info.asked for session in asked.values()] == [
        'network, landmarks decide', 'landmarks', 'network']
    assert asked['network'].locate(shown(frames[20])).status is Status.UNCERTAIN
    assert asked['landmarks'].locate(shown(frames[20])).status is Status.TRACKING
    # The landmarks decide, with the pose of the network as their hint.
    hints = []
    refused = Estimate(0, Status.NOT_LOCALISED, reason='TOO_FEW_INLIERS')
    monkeypatch.setattr('feedforward_recon.localization.localizer.Localizer.localize',
                        lambda _, frame, hint=None: (hints.append(hint), refused)[1])
    assert asked['auto'].locate(shown(frames[20])).reason == refused.reason
    assert_near(hints[0], frames[20])


def test_landmarks_alone_need_nothing_of_what_the_network_wrote(frames, saved, tmp_path):
    folder = shutil.copytree(saved.path, tmp_path / 'map')
    (folder / NETWORK).unlink()
    for config in (NodeConfig(), replace(CONFIG, localize_with='landmarks')):
        session = session_of(replace(config, mode='localization', map=str(folder)))
        assert session.locate(shown(frames[20])).status is Status.TRACKING
    with pytest.raises(MapError, match=NETWORK):
        session_of(replace(CONFIG, mode='localization', map=str(folder)))


def test_settings_of_the_localizer_reach_the_landmarks_that_decide(saved):
    session = session_of(replace(CONFIG, mode='localization', map=str(saved.path)))
    session.configure(replace(CONFIG.mapper, localizer=replace(CONFIG.localizer, min_inliers=77)))
    assert session._asked.refiner.config.min_inliers == 77


def test_a_network_that_cannot_be_asked_is_refused_in_one_sentence(saved, drafted):
    for config, folder, sentence in (
            (replace(CONFIG, model='tiny'), saved.path, 'expected the network tiny-ttt'),
            (replace(CONFIG, localize_with='network'), drafted.path, 'map with model vgg-t3')):
        with pytest.raises(MapError, match=sentence) as caught:
            session_of(replace(config, mode='localization', map=str(folder)))
        assert '\n' not in str(caught.value)
    assert session_of(replace(CONFIG, mode='localization', map=str(drafted.path))
                      ).info.asked == 'landmarks'
    asked = session_of(replace(CONFIG, mode='localization', map=str(saved.path)))._asked
    memory = NetworkMemory(asked.network.predictor, 'tiny-ttt')
    with pytest.raises(MapError, match='expected hybrid attention'):
        memory.localizer(replace(saved.fast_weights(), attention='hybrid'), asked.points)
    with pytest.raises(ConfigError, match='localize_with'):
        session_of(NodeConfig(localize_with='network'))
