"""Images before a network: sizes as published, pixels as Pillow makes them, a way back."""

import numpy as np
import pytest
import torch
from PIL import Image

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model import preprocess
from feedforward_recon.model.preprocess import (
    bicubic,
    crop,
    lanczos,
    longest_side,
    match_pixels,
    resampled,
    stacked,
)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize(('prepare', 'size_hw', 'expected_hw'), [
    (crop, (480, 640), (392, 518)), (crop, (1080, 1920), (294, 518)),
    (crop, (640, 480), (518, 518)), (crop, (100, 100), (518, 518)),
    (match_pixels, (480, 640), (434, 574)), (match_pixels, (1080, 1920), (378, 672)),
    (match_pixels, (700, 700), (504, 504)),
    (longest_side, (480, 640), (378, 504)), (longest_side, (1080, 1920), (280, 504))])
def test_sizes_are_the_published_ones(prepare, size_hw, expected_hw):
    placed, = prepare([noise(*size_hw)])
    assert placed.image.shape == (*expected_hw, 3)


@pytest.mark.parametrize('size_hw', [(480, 640), (1080, 1920), (700, 300)])
def test_speed3r_gets_whole_windows_of_patches(size_hw):
    placed, = match_pixels([noise(*size_hw)], patches=4)
    height, width = placed.image.shape[:2]
    assert height % 56 == width % 56 == 0 and 200_000 < height * width <= 255_000
    assert width / height == pytest.approx(size_hw[1] / size_hw[0], rel=0.15)


@pytest.mark.parametrize('size_hw', [((48, 64), (31, 57)), ((48, 64), (100, 90)),
                                     ((33, 200), (14, 518)), ((40, 40), (40, 40))])
@pytest.mark.parametrize(('kernel', 'name'), [(bicubic, 'BICUBIC'), (lanczos, 'LANCZOS')])
def test_pixels_are_those_of_pillow(kernel, name, size_hw):
    (height, width), (rows, columns) = size_hw
    image, method = noise(height, width), getattr(Image.Resampling, name)
    once = Image.fromarray(image).resize((columns, height), method)
    expected = np.asarray(once.resize((columns, rows), method))
    found = resampled(image, (rows, columns), kernel)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize('prepare', [crop, match_pixels, longest_side])
@pytest.mark.parametrize('size_hw', [(480, 640), (640, 480)])
def test_intrinsics_find_the_way_back(prepare, size_hw):
    """A bright blob is projected to the same place by the original and by the new camera."""
    height, width = size_hw
    camera = Camera(width, height, 500.0, 510.0, 300.0, 250.0)
    ray = np.array([[-0.05, 0.03, 1.0]])
    u, v = camera.project(ray)[0]
    rows, columns = np.mgrid[:height, :width]
    blob = np.exp(-((columns - u)**2 + (rows - v)**2) / 400)
    placed, = prepare([np.repeat((250 * blob[..., None]).astype(np.uint8), 3, -1)])
    seen = placed.image[..., 0].astype(float) * (placed.image[..., 0] < 255)
    rows, columns = np.mgrid[:seen.shape[0], :seen.shape[1]]
    centre = np.array([(columns * seen).sum(), (rows * seen).sum()]) / seen.sum()
    scale, offset = np.array(placed.scale_xy), np.array(placed.offset_xy)
    np.testing.assert_allclose((np.array([u, v]) + 0.5) * scale - 0.5 + offset, centre, atol=0.1)
    K = np.array(camera.K)
    K[:2] *= scale[:, None]
    K[:2, 2] = (camera.K[:2, 2] + 0.5) * scale - 0.5 + offset
    np.testing.assert_allclose(placed.original_K(K), camera.K, atol=1e-9)


def test_transparency_is_laid_on_white():
    image = noise(30, 40, 4)
    image[:15, :, 3], image[15:, :, 3] = 0, 255
    rgb = preprocess.checked_rgb(image)
    assert (rgb[:15] == 255).all() and (rgb[15:] == image[15:, :, :3]).all()


def test_padding_is_white_and_centred():
    placed, _ = crop([np.zeros((240, 400, 3), np.uint8), np.zeros((400, 400, 3), np.uint8)])
    rows = np.flatnonzero((placed.image == 0).all((1, 2)))
    assert len(rows) == 308 and rows[0] == (518 - 308) // 2
    assert (np.delete(placed.image, rows, 0) == 255).all()


def test_mixed_sizes_become_one(caplog):
    mixed = [noise(480, 640), noise(300, 640), noise(640, 480)]
    for prepare, expected_hw in ((crop, (518, 518)), (match_pixels, (434, 574)),
                                 (longest_side, (238, 378))):
        assert stacked(prepare(mixed)).shape == (1, 3, 3, *expected_hw)
    assert 'sizes' in caplog.text


def test_stacked_images_are_floats_between_0_and_1():
    images = stacked(crop([np.full((50, 70, 3), 255, np.uint8)]))
    assert images.dtype == torch.float32 and images.max() == 1


@pytest.mark.parametrize('prepare', [crop, match_pixels, longest_side])
def test_images_thinner_than_a_patch_are_refused(prepare):
    with pytest.raises(InputError, match='at least one patch'):
        prepare([noise(1, 30_000)])


@pytest.mark.parametrize('image', [np.zeros((20, 20), np.uint8), np.zeros((20, 20, 3)),
                                   np.zeros((20, 20, 5), np.uint8)])
def test_what_is_no_rgb_image_is_refused(image):
    with pytest.raises(InputError, match='expected an RGB'):
        crop([image])


def test_images_of_different_sizes_cannot_be_stacked():
    with pytest.raises(InputError, match='one size'):
        stacked(crop([noise(480, 640)]) + crop([noise(300, 640)]))
