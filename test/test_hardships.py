"""A hard frame shows what its camera sees from its pose, worse; the room itself is the witness."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.synthetic import Room, hardships
from feedforward_recon.types import Frame

# Nothing is in the middle, so that an error of the principal point shows; the size is odd.
CAMERA = Camera(321, 241, 250.0, 250.0, 152.5, 126.0)
PATCH, SEARCH = 20, 6  # half sizes, pixels


@pytest.fixture(scope='module')
def room() -> Room:
    return Room.generate(5)


@pytest.fixture(scope='module')
def frame(room) -> Frame:
    pose = room.walk(12, seed=1)[6]
    image, depth = room.render(CAMERA, pose)
    return Frame(7, image, depth, CAMERA, 'a.png', pose)


def grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def shown_at(frame: Frame, hard: Frame, count: int = 60) -> np.ndarray:
    """Where [N, 2] the hard frame's camera and pose see the corners of a frame."""
    corners = cv2.goodFeaturesToTrack(grey(frame.image), count, 0.02, 12)[:, 0]
    column, row = np.rint(corners).astype(int).T
    points = transform_points(frame.T_map_cam,
                              CAMERA.unproject(corners, frame.depth[row, column]))
    return hard.camera.project(transform_points(inverse(hard.T_map_cam), points))


def inside(pixels: np.ndarray, size_wh: tuple[int, int], border: int) -> np.ndarray:
    return np.all((pixels > border) & (pixels < np.array(size_wh) - border - 1), axis=1)


def found_off(sharp: np.ndarray, hard: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Where patches of one image correlate best with the other, relative to where they are."""
    offsets = []
    for x, y in np.rint(pixels[inside(pixels, sharp.shape[::-1], PATCH + SEARCH)]).astype(int):
        patch, around = (image[y - half:y + half + 1, x - half:x + half + 1]
                         for image, half in ((sharp, PATCH), (hard, PATCH + SEARCH)))
        likeness = cv2.matchTemplate(around, patch, cv2.TM_CCOEFF_NORMED)
        offsets.append(np.array(cv2.minMaxLoc(likeness)[3]) - SEARCH)
    assert len(offsets) > 15
    return np.array(offsets, float)


@pytest.mark.parametrize('name', hardships.HARDSHIPS)
@pytest.mark.parametrize('seed', [0, 1])
def test_things_are_where_camera_and_pose_say(room, frame, name, seed):
    """Patches of what the room looks like from there are found in the hard image, in place."""
    hard = hardships.HARDSHIPS[name](frame, seed)
    pixels = shown_at(frame, hard)
    truth, _ = room.render(hard.camera, hard.T_map_cam)
    off = found_off(grey(truth), grey(hard.image), pixels)
    assert np.abs(np.median(off, axis=0)).max() <= 0.5
    assert np.median(np.linalg.norm(off, axis=1)) <= 1.0


@pytest.mark.parametrize('name', ['twice the distance', '30 degrees of roll'])
@pytest.mark.parametrize('seed', [0, 1])
def test_another_view_is_as_the_room_renders_it(room, frame, name, seed):
    """To a tenth of a pixel, by optical flow, and in brightness, where there is an image."""
    hard = hardships.HARDSHIPS[name](frame, seed)
    truth = grey(room.render(hard.camera, hard.T_map_cam)[0])
    image = grey(hard.image)
    pixels = shown_at(frame, hard, count=200)
    pixels = pixels[inside(pixels, hard.camera.size_wh, 15)].astype(np.float32)[:, None]
    flow, status, _ = cv2.calcOpticalFlowPyrLK(truth, image, pixels, None, winSize=(15, 15))
    off = (flow - pixels)[status == 1]
    assert len(off) > 30
    assert np.abs(np.median(off, axis=0)).max() < 0.1
    assert np.median(np.linalg.norm(off, axis=1)) < 0.2
    shown = cv2.erode(np.uint8(image > 0), np.ones((5, 5))) > 0
    difference = np.abs(truth.astype(float) - image)[shown]
    assert shown.mean() > 0.6
    assert difference.mean() < 0.15 * truth.std()


@pytest.mark.parametrize('seed', [0, 1])
def test_roll_turns_the_pose_about_the_optical_axis_alone(frame, seed):
    hard = hardships.rolled(frame, seed)
    turn = inverse(frame.T_map_cam) @ hard.T_map_cam
    np.testing.assert_allclose(turn[:3, 3], 0, atol=1e-12)
    np.testing.assert_allclose(turn[:3, 2], (0, 0, 1), atol=1e-12)
    assert np.degrees(np.arccos(turn[0, 0])) == pytest.approx(hardships.ROLL_DEG)
    assert hard.camera == frame.camera and hard.image.shape == frame.image.shape


def test_a_frame_without_a_pose_is_rolled_without_one(frame):
    assert hardships.rolled(replace(frame, T_map_cam=None)).T_map_cam is None


def test_both_sides_are_rolled_to(frame):
    turns = {float(np.sign(hardships.rolled(frame, seed).T_map_cam[:3, 0]
                           @ frame.T_map_cam[:3, 1])) for seed in range(8)}
    assert turns == {-1.0, 1.0}


def test_twice_the_distance_halves_focal_length_and_size(frame):
    hard = hardships.farther(frame)
    assert hard.camera.size_wh == (160, 120) and hard.image.shape == (120, 160, 3)
    assert (hard.camera.fx, hard.camera.fy) == (CAMERA.fx / 2, CAMERA.fy / 2)
    np.testing.assert_array_equal(hard.T_map_cam, frame.T_map_cam)


@pytest.mark.parametrize('seed', range(4))
def test_blur_keeps_the_light_and_takes_the_detail(frame, seed):
    hard = hardships.blurred(frame, seed)
    assert abs(float(hard.image.mean()) - float(frame.image.mean())) < 1.0
    sharp, soft = (cv2.Laplacian(grey(image), cv2.CV_64F).std()
                   for image in (frame.image, hard.image))
    assert soft < 0.4 * sharp


def test_blur_is_a_line_as_long_as_it_says(frame):
    """Of one bright point: as much light as before, around where it was, in a thin line."""
    point = np.zeros((61, 61, 3), np.uint8)
    point[30, 30] = 255
    for seed in range(4):
        path = hardships.blurred(replace(frame, image=point), seed).image[..., 0].astype(float)
        y, x = np.mgrid[:61, :61] - 30.0
        weight = path / path.sum()
        covariance = np.cov(np.stack([x.ravel(), y.ravel()]), aweights=weight.ravel())
        across, along = np.sqrt(12 * np.linalg.eigvalsh(covariance))  # of a uniform line
        assert path.sum() == pytest.approx(255, rel=0.1)
        assert np.hypot((weight * x).sum(), (weight * y).sum()) < 0.2
        assert along == pytest.approx(15, abs=2) and across < 4


def test_darkness_leaves_its_share_of_the_light(frame):
    bright, hard = frame.image.astype(float), hardships.dark(frame).image.astype(float)
    assert hard.mean() == pytest.approx(hardships.DARK * bright.mean(), rel=0.05)
    lit = bright > 60  # where noise does not end at black
    noise = (hard - hardships.DARK * bright)[lit]
    assert noise.std() == pytest.approx(hardships.DARK_NOISE, rel=0.1)


def test_low_contrast_leaves_its_share_of_it(frame):
    bright, hard = frame.image.astype(float), hardships.flat(frame).image.astype(float)
    slope, offset = np.polyfit(bright.ravel(), hard.ravel(), 1)
    assert slope == pytest.approx(hardships.FLAT, rel=0.02)
    assert slope * hardships.GREY + offset == pytest.approx(hardships.GREY, abs=0.2)
    noise = hard - (slope * bright + offset)
    assert noise.std() == pytest.approx(hardships.FLAT_NOISE, rel=0.1)


@pytest.mark.parametrize('name', hardships.HARDSHIPS)
def test_a_seed_gives_one_image_and_the_frame_stays(frame, name):
    change, before = hardships.HARDSHIPS[name], frame.image.copy()
    first, second = change(frame, 3), change(frame, 3)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.image.dtype == np.uint8 and first.image.flags['C_CONTIGUOUS']
    assert first.depth is None and first.right is None  # they would not fit the image
    assert (first.stamp_ns, first.source) == (frame.stamp_ns, frame.source)
    np.testing.assert_array_equal(frame.image, before)


@pytest.mark.parametrize('name', ['blur', 'dark', 'low contrast', '30 degrees of roll'])
def test_other_seeds_give_other_images(frame, name):
    images = {hardships.HARDSHIPS[name](frame, seed).image.tobytes() for seed in range(6)}
    assert len(images) > 1
