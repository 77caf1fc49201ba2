"""Which mapped images become anchors of the next window."""

from dataclasses import replace

import numpy as np
import pytest
from test_windows import CAMERA, FPS, Oracle, error

from feedforward_recon.config.network import WindowConfig
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.sources.anchors import MIN_AGE, OLD_IMAGES, AnchorImages
from feedforward_recon.mapping.sources.windows import WindowPoses
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Prediction


def descriptor(angle):
    """A global descriptor; neighbours in angle are similar."""
    return np.array([np.cos(angle), np.sin(angle)])


def image(number):
    return np.full((4, 6, 3), number % 251, np.uint8)


def prediction(number):
    T = np.eye(4)
    T[0, 3] = number
    return Prediction(T[None], np.eye(3)[None], np.ones((1, 4, 6), np.float32),
                      np.ones((1, 4, 6), np.float32))


def walked(windows, size=4, step=0.1):
    """Anchor images after windows of images whose descriptors turn by ``step`` each."""
    images, number, anchors = AnchorImages(), 0, None
    for _ in range(windows):
        images.begin(anchors)
        for _ in range(size):
            images.add(number, image(number), prediction(number), (1e-4 * number, 1e-6),
                      descriptor(step * number))
            number += 1
        anchors = images.chosen(4, [descriptor(step * number)], lambda frame: None)
    return images, number


def frames(anchors):
    return [item.frame for item in anchors.items]


def test_the_first_anchors_are_the_later_half_with_the_last_image():
    images, _ = walked(1, size=8)
    anchors = images.chosen(3, [descriptor(0)], lambda frame: None)
    assert frames(anchors) == [3, 5, 7] and anchors.recent.all()


def test_a_walk_that_comes_back_has_anchors_at_its_start():
    images, _ = walked(6)
    back = images.chosen(4, [descriptor(0.1), descriptor(0.0)], lambda frame: None)
    assert {0, 1} <= set(frames(back)) and not back.recent[:2].any()
    assert back.recent[2:].all() and len(back) == 4
    new = images.chosen(4, [descriptor(np.pi)], lambda frame: None)
    assert new.recent.all(), 'another place looks like none that is mapped'


def test_the_windows_just_before_give_no_old_anchors():
    images, number = walked(MIN_AGE)
    again = images.chosen(4, [descriptor(0.1 * (number - 5))], lambda frame: None)
    assert again.recent.all()


def test_poses_are_those_that_the_map_has_now():
    images, number = walked(2)
    moved = np.diag([1.0, 1, 1, 1])
    moved[1, 3] = 5
    anchors = images.chosen(4, [descriptor(0)],
                            lambda frame: moved if frame == number - 1 else None)
    np.testing.assert_array_equal(anchors.T_map_cam[-1], moved)
    assert anchors.T_map_cam[0, 0, 3] == anchors.items[0].frame
    assert anchors.variance[0] == pytest.approx(1e-4 * (number - 1))


def old_anchors(images, number):
    """All old images: those chosen when every direction is asked for and every place is free."""
    for _ in range(MIN_AGE):
        images.begin(None)
        images.add(number, image(number), prediction(number), (0.0, 0.0), None)
    every = [descriptor(angle) for angle in np.arange(0, 2 * np.pi, 0.1)]
    anchors = images.chosen(4 * OLD_IMAGES, every, lambda frame: None)
    return anchors.select(~anchors.recent).items


def test_old_images_are_bounded_and_those_that_differ_stay():
    old = old_anchors(*walked(60, size=8, step=0.02))
    assert len(old) == OLD_IMAGES
    assert {item.frame for item in old} & set(range(10)), 'the start was given up'
    angles = np.sort([np.arctan2(*item.global_descriptor[::-1]) for item in old])
    assert np.diff(angles).max() < 0.3


def test_images_that_are_no_keyframes_are_anchors_of_the_next_window_only():
    images = AnchorImages()
    for window in range(MIN_AGE + 2):
        images.begin(None)
        images.add(window, image(window), prediction(window), (0.0, 0.0), None)
    assert frames(images.chosen(2, [descriptor(0)], lambda frame: None)) == [MIN_AGE + 1]


def test_a_network_that_drifts_closes_a_loop():
    """Depth off by 2 %, poses by 1 cm: with new images alone as anchors it ends 18 cm off."""
    room = Room.generate(11)
    frames = list(render_walk(room, CAMERA, room.walk(90, seed=0, fps=FPS), fps=FPS))
    encoder, config = CompactEncoder.load(), MapperConfig()
    source = WindowPoses(config, Oracle(frames, 4, noise=0.02, turn=0.01), encoder,
                         windows=WindowConfig(16, 4), refine=False)
    mapper = Mapper(config, encoder, source=source)
    for frame in frames:
        mapper.process(replace(frame, T_map_cam=None, depth=None))
    scene = mapper.finish()
    T = scene.trajectory.T_map_cam
    assert len(T) == len(frames)
    moved = error(scene, frames).scale * (T[-1, :3, 3] - T[0, :3, 3])
    true = (inverse(frames[0].T_map_cam) @ frames[-1].T_map_cam)[:3, 3]
    assert np.linalg.norm(moved - true) < 0.08
