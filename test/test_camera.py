"""Cameras: projecting and unprojecting are inverse, and image changes keep K right."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera

PINHOLE = Camera(640, 480, 520.0, 515.0, 321.5, 236.2)
CAMERAS = {
    'pinhole': PINHOLE,
    'plumb_bob 4': replace(PINHOLE, distortion=(-0.18, 0.05, 0.001, -0.0007)),
    'plumb_bob 5': replace(PINHOLE, distortion=(-0.18, 0.05, 0.001, -0.0007, 0.01)),
    'rational': replace(PINHOLE, model='rational',
                        distortion=(0.3, -0.05, 1e-4, 2e-4, 0.01, 0.55, -0.02, 0.001)),
    'radial': replace(PINHOLE, distortion=(-0.35, 0.15, 0.0, 0.0, -0.03)),
    'strong': replace(PINHOLE, distortion=(-0.35, 0.15, 0.001, -0.0007, -0.03)),
    'fisheye': replace(PINHOLE, model='fisheye', fx=280.0, fy=281.0,
                       distortion=(-0.02, 0.004, -0.002, 0.0003)),
}


@pytest.fixture(params=CAMERAS.values(), ids=CAMERAS)
def camera(request):
    return request.param


def pixel_grid(camera, margin=5):
    u, v = np.meshgrid(np.linspace(margin, camera.width - 1 - margin, 15),
                       np.linspace(margin, camera.height - 1 - margin, 11))
    return np.stack([u.ravel(), v.ravel()], 1)


def test_unproject_then_project_returns_the_pixel(camera):
    pixels = pixel_grid(camera)
    depth = np.random.default_rng(0).uniform(0.2, 30, len(pixels))
    points = camera.unproject(pixels, depth)
    np.testing.assert_allclose(points[:, 2], depth)
    np.testing.assert_allclose(camera.project(points), pixels, atol=1e-4)


def test_project_then_unproject_returns_the_point(camera):
    points = np.random.default_rng(1).uniform([-0.4, -0.3, 1], [0.4, 0.3, 1], (200, 3))
    points *= np.random.default_rng(2).uniform(0.3, 20, (200, 1))
    back = camera.unproject(camera.project(points), points[:, 2])
    np.testing.assert_allclose(back / points[:, 2:], points / points[:, 2:], atol=1e-6)


def test_a_radial_lens_shows_what_opencv_says():
    camera = CAMERAS['radial']
    points = np.random.default_rng(1).uniform([-0.6, -0.4, 1], [0.6, 0.4, 1], (200, 3))
    zero = np.zeros(3)
    expected = cv2.projectPoints(points, zero, zero, camera.K, np.array(camera.distortion))[0]
    np.testing.assert_allclose(camera.project(points), expected[:, 0], atol=1e-9)


def test_projection_depends_on_the_ray_only(camera):
    points = np.random.default_rng(3).uniform([-1, -1, 2], [1, 1, 4], (50, 3))
    np.testing.assert_allclose(camera.project(points), camera.project(points * 7.5), atol=1e-6)


def test_distortion_of_zero_is_a_pinhole(camera):
    points = np.random.default_rng(4).uniform([-1, -1, 2], [1, 1, 4], (50, 3))
    straight = replace(camera, distortion=(), model='plumb_bob')
    assert not straight.is_distorted
    expected = points @ camera.K.T
    np.testing.assert_allclose(straight.project(points), expected[:, :2] / expected[:, 2:])


def test_points_behind_have_no_pixel(camera):
    pixels = camera.project(np.array([[0, 0, -1.0], [0, 0, 0], [0.1, 0, 2]]))
    np.testing.assert_array_equal(np.isnan(pixels).all(1), [True, True, False])
    assert camera.project(np.zeros((0, 3))).shape == (0, 2)
    assert camera.normalise(np.zeros((0, 2))).shape == (0, 2)
    assert np.isnan(camera.project(np.array([[0, 0, -1.0]]))).all()


def scaled(pixels, size_from, size_to):
    """Where cv2.resize puts a pixel: areas scale, and a pixel's centre is half a pixel in."""
    factor = np.divide(size_to, size_from)
    return (pixels + 0.5) * factor - 0.5


@pytest.mark.parametrize('size_wh', [(320, 240), (641, 479), (1280, 960), (97, 211)])
def test_resizing_commutes_with_projecting(camera, size_wh):
    points = camera.unproject(pixel_grid(camera), np.full(165, 2.0))
    np.testing.assert_allclose(camera.resized(size_wh).project(points),
                               scaled(camera.project(points), camera.size_wh, size_wh), atol=1e-6)
    assert camera.resized(size_wh).size_wh == size_wh


def test_resizing_back_is_the_identity(camera):
    back = camera.resized((320, 240)).resized(camera.size_wh)
    np.testing.assert_allclose(back.K, camera.K)
    assert back.distortion == camera.distortion


def test_resized_agrees_with_what_opencv_does_to_an_image():
    """A bright spot lands where the resized camera says."""
    image = np.zeros((480, 640), np.float32)
    cv2.circle(image, (400, 140), 6, 1.0, -1)
    small = cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA)
    v, u = np.indices(small.shape)
    spot = np.array([(u * small).sum(), (v * small).sum()]) / small.sum()
    point = PINHOLE.unproject([[400, 140]], [3.0])
    np.testing.assert_allclose(PINHOLE.resized((160, 120)).project(point)[0], spot, atol=0.02)


def test_cropping_shifts_pixels(camera):
    points = camera.unproject(pixel_grid(camera), np.full(165, 2.0))
    window = camera.cropped(100, 40, (300, 200))
    np.testing.assert_allclose(window.project(points), camera.project(points) - (100, 40),
                               atol=1e-9)
    assert window.size_wh == (300, 200)


def test_crop_then_resize_keeps_the_ray_of_a_pixel(camera):
    small = camera.cropped(80, 60, (480, 360)).resized((240, 180))
    pixels = np.array([[10.0, 20], [120, 90], [230, 170]])
    original = scaled(pixels, (240, 180), (480, 360)) + (80, 60)
    np.testing.assert_allclose(small.normalise(pixels), camera.normalise(original), atol=1e-9)


def test_field_of_view_spans_the_image():
    camera = Camera.from_fov(90.0, (640, 480))
    edges = camera.normalise(np.array([[-0.5, 239.5], [639.5, 239.5]]))
    np.testing.assert_allclose(edges, [[-1, 0], [1, 0]], atol=1e-12)
    assert camera.fx == camera.fy


def test_matrix_round_trip(camera):
    again = Camera.from_matrix(camera.K, camera.size_wh, camera.distortion, camera.model)
    assert again == camera


@pytest.mark.parametrize('camera', [PINHOLE, CAMERAS['plumb_bob 4']], ids=['none', 'k1 to p2'])
@pytest.mark.parametrize(('focal_scale', 'radial'), [(1.0, -0.02), (1.0, 0.01), (1.02, 0.0)])
def test_another_lens_equals_bending_what_the_first_one_shows(camera, focal_scale, radial):
    """To first order: px = K d(s x (1 + k x^2)) is what bundle adjustment models."""
    xy = np.random.default_rng(5).uniform(-0.35, 0.35, (200, 2))
    bent = focal_scale * xy * (1 + radial * (xy**2).sum(1, keepdims=True))
    one = np.ones((len(xy), 1))
    expected = camera.project(np.concatenate([bent, one], 1))
    found = camera.with_lens(focal_scale, radial).project(np.concatenate([xy, one], 1))
    np.testing.assert_allclose(found, expected, atol=0.3 if camera.is_distorted else 1e-9)


def test_no_change_of_the_lens_changes_nothing(camera):
    assert camera.with_lens(1.0, 0.0) == camera


@pytest.mark.parametrize(('change', 'message'), [
    ({'model': 'omni'}, "found 'omni'; rectify"),
    ({'distortion': (0.1, 0.2)}, 'found 2; check the calibration'),
    ({'distortion': (0.1,) * 5, 'model': 'fisheye'}, r'expected \(4,\) coefficients'),
    ({'fx': 0.0}, 'found fx=0.0'),
    ({'fy': -500.0}, 'fy=-500.0'),
    ({'cx': float('nan')}, 'positive finite focal lengths'),
    ({'distortion': (0.1, float('inf'), 0, 0)}, 'finite'),
    ({'width': 0}, 'found 0x480'),
])
def test_impossible_cameras_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(PINHOLE, **change)


@pytest.mark.parametrize('degrees', [0.0, 180.0, -20.0])
def test_impossible_fields_of_view_are_refused(degrees):
    with pytest.raises(InputError, match='field of view'):
        Camera.from_fov(degrees, (640, 480))
