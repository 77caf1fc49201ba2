"""What the player plays, and when."""

from dataclasses import replace

import numpy as np
import pytest

from feedforward_recon.config.schema import from_dict
from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.io.encode import DEPTH_FORMAT, compressed_depth, jpeg
from feedforward_recon.io.images import decode_compressed, decode_compressed_depth
from feedforward_recon.ros.playback import (
    SECOND_NS,
    PlayerConfig,
    SyntheticConfig,
    Timeline,
    open_playback,
    rounds,
)

SMALL = SyntheticConfig(width=64, height=48, frames=4, fps=10.0)


def synthetic(**options):
    return open_playback(PlayerConfig(source='synthetic:3', synthetic=SMALL, **options))


@pytest.fixture(scope='module')
def room():
    return synthetic()


def test_a_synthetic_room_is_the_same_every_time(room):
    first, second = list(room), list(synthetic())
    assert len(first) == len(room) == 4
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.T_map_cam, b.T_map_cam)
    assert [frame.stamp_ns for frame in first] == [0, 100_000_000, 200_000_000, 300_000_000]


def test_depth_steps_and_length_are_respected():
    assert all(frame.depth is None for frame in synthetic(use_depth=False))
    assert [f.stamp_ns for f in synthetic(step=2)] == [0, 200_000_000]
    assert len(list(synthetic(max_frames=3))) == 3


def test_held_out_views_are_not_on_the_walk():
    views = open_playback(PlayerConfig(source='synthetic:3', synthetic=SyntheticConfig(
        width=64, height=48, frames=24, held_out=3)))
    walk = open_playback(PlayerConfig(source='synthetic:3', synthetic=SyntheticConfig(
        width=64, height=48, frames=24)))
    walked = np.stack([frame.T_map_cam[:3, 3] for frame in walk])
    assert len(views) == 3
    for view in views:
        assert np.linalg.norm(walked - view.T_map_cam[:3, 3], axis=1).min() > 0.01


def test_a_folder_is_played_as_it_is(walk_folder):
    source = open_playback(PlayerConfig(source=str(walk_folder), max_frames=2))
    assert source.calibrated and source.has_depth and source.has_poses
    assert len(list(source)) == 2


@pytest.mark.parametrize('source', ['', 'synthetic:', 'synthetic:-1', 'synthetic:one'])
def test_a_source_that_is_none_is_refused(source):
    with pytest.raises(ConfigError, match='expected'):
        open_playback(PlayerConfig(source=source))


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(InputError, match='found nothing'):
        open_playback(PlayerConfig(source='/no/such/walk'))


@pytest.mark.parametrize('settings', [{'publish_clock': True, 'stamps': 'now'},
                                      {'rate': 0.0, 'reliable': False}, {'rate': -1.0}])
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ConfigError, match='expected'):
        from_dict(PlayerConfig, settings)


def test_rounds_keep_stamps_rising_in_even_steps(room):
    frames = rounds(room, loop=True)
    stamps = [next(frames).stamp_ns for _ in range(11)]
    assert set(np.diff(stamps)) == {100_000_000}


def test_one_round_ends(room):
    assert len(list(rounds(room, loop=False))) == 4


def test_no_stamp_is_zero(room):
    """In ROS that means that nobody set it."""
    assert [frame.stamp_ns for frame in rounds(room, loop=False)] == [
        SECOND_NS + frame.stamp_ns for frame in room]


def test_stamps_of_a_recording_stay(walk_folder):
    source = open_playback(PlayerConfig(source=str(walk_folder), step=10))
    later = [replace(frame, stamp_ns=frame.stamp_ns + 5) for frame in source]
    assert [f.stamp_ns for f in rounds(later, loop=False)] == [f.stamp_ns for f in later]


@pytest.mark.parametrize(('rate', 'due_s'), [(1.0, 12.5), (2.0, 11.25), (0.5, 15.0)])
def test_a_frame_is_due_in_recorded_time_over_rate(rate, due_s):
    timeline = Timeline(rate)
    assert timeline.due(7_000_000_000, 10.0) == 10.0
    assert timeline.due(9_500_000_000, 11.0) == pytest.approx(due_s)


def test_rate_zero_is_never_late():
    timeline = Timeline(0.0)
    assert [timeline.due(stamp, 3.0) for stamp in (0, 10**12)] == [3.0, 3.0]


def test_what_is_encoded_can_be_decoded():
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.2, 70.0, (20, 30)).astype(np.float32)
    depth[0, 0] = 0.0
    decoded = decode_compressed_depth(compressed_depth(depth), DEPTH_FORMAT, 'test')
    held = depth < 65.535
    np.testing.assert_allclose(decoded[held], depth[held], atol=5.1e-4)
    assert not decoded[~held].any()  # 16 bits of millimetres do not reach that far
    image = np.full((16, 24, 3), (200, 30, 90), np.uint8)
    np.testing.assert_allclose(decode_compressed(jpeg(image), 'test').astype(int), image, atol=4)
