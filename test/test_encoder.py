"""Laws of the compact encoder: deterministic, exact about pixels, strict about weights."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from feedforward_recon.config.schema import EncoderConfig
from feedforward_recon.errors import CheckpointError, InputError
from feedforward_recon.model.compact import (
    CompactEncoder,
    CompactNetwork,
    CompactShape,
    detect_corners,
    load_compact,
    save_compact,
    shipped_compact,
)


@pytest.fixture(scope='module')
def picture(room_frames):
    image = room_frames[0].image
    return cv2.resize(image, (320, 240), interpolation=cv2.INTER_CUBIC)


def mutual_matches(a, b):
    similarity = a.descriptors @ b.descriptors.T
    best = similarity.argmax(1)
    mutual = similarity.argmax(0)[best] == np.arange(len(a))
    return np.flatnonzero(mutual), best[mutual]


def test_features_are_unit_finite_and_inside(encoder, picture):
    features = encoder.encode(picture)
    assert 100 < len(features) <= encoder.config.max_keypoints
    assert np.allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-4)
    assert np.isclose(np.linalg.norm(features.global_descriptor), 1, atol=1e-4)
    assert np.all((features.confidence > 0) & (features.confidence <= 1))
    assert np.all(features.keypoints >= -0.5)
    assert np.all(features.keypoints <= np.array(picture.shape[1::-1]) - 0.5)


def test_the_most_confident_come_first_and_the_count_is_kept(encoder, picture):
    features = encoder.encode(picture, 50)
    assert len(features) == 50
    assert np.all(np.diff(features.confidence) <= 0)


def test_encoding_twice_gives_the_same_bits(encoder, picture):
    a, b = encoder.encode(picture), encoder.encode(picture)
    assert np.array_equal(a.descriptors, b.descriptors)
    assert np.array_equal(a.keypoints, b.keypoints)


def test_known_rotation_is_recovered_by_matching(encoder, picture):
    """Matches between an image and its 15 degree rotation land where the rotation says."""
    size = picture.shape[1::-1]
    turn = cv2.getRotationMatrix2D((size[0] / 2, size[1] / 2), 15, 0.9)
    turned = cv2.warpAffine(picture, turn, size, flags=cv2.INTER_AREA)
    a, b = encoder.encode(picture), encoder.encode(turned)
    i, j = mutual_matches(a, b)
    expected = a.keypoints[i] @ turn[:, :2].T + turn[:, 2]
    error = np.linalg.norm(expected - b.keypoints[j], axis=1)
    assert len(i) > 50
    assert np.mean(error < 3) > 0.6


def test_brighter_image_still_matches(encoder, picture):
    brighter = np.clip(picture.astype(float) * 1.3 + 15, 0, 255).astype(np.uint8)
    a, b = encoder.encode(picture), encoder.encode(brighter)
    i, j = mutual_matches(a, b)
    error = np.linalg.norm(a.keypoints[i] - b.keypoints[j], axis=1)
    assert np.mean(error < 2) > 0.8


def test_the_network_made_fast_describes_like_the_one_that_was_trained(encoder, picture):
    features = encoder.encode(picture)
    trained = load_compact(shipped_compact())
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        told, _ = trained.eval()(image, torch.from_numpy(features.keypoints)[None])
    likeness = (told[0].numpy() * features.descriptors).sum(1)
    assert likeness.min() > 0.99
    assert np.median(likeness) > 0.999


def test_keypoints_are_in_pixels_of_the_given_image():
    """A large image is scaled down inside; the answer stays in its own pixels."""
    image = np.full((960, 1280, 3), 30, np.uint8)
    corners = np.array([[200.5, 300.5], [900.5, 500.5], [640.5, 800.5]])
    for u, v in corners:
        image[int(v + 0.5):, int(u + 0.5):][:60, :60] = 230
    network = CompactNetwork(CompactShape(stem=8, widths=(8, 8, 8, 8), depths=(1, 1, 1, 1)))
    features = CompactEncoder(network, '', EncoderConfig()).encode(image)
    for corner in corners:
        assert np.linalg.norm(features.keypoints - corner, axis=1).min() < 1.0


def test_corner_of_a_square_is_found_to_a_third_of_a_pixel():
    image = np.full((120, 160), 20, np.uint8)
    image[40:80, 50:100] = 220
    corners = detect_corners(cv2.GaussianBlur(image, (0, 0), 1.0), 10, 5)
    for expected in ((49.5, 39.5), (99.5, 39.5), (49.5, 79.5), (99.5, 79.5)):
        assert np.linalg.norm(corners - expected, axis=1).min() < 0.33


def test_flat_image_has_no_features(encoder):
    features = encoder.encode(np.full((120, 160, 3), 128, np.uint8))
    assert len(features) == 0
    assert features.descriptors.shape == (0, encoder.dim)


@pytest.mark.parametrize('image', [np.zeros((10, 10), np.uint8), np.zeros((10, 10, 3))])
def test_other_arrays_are_refused(encoder, image):
    with pytest.raises(InputError, match='RGB image uint8'):
        encoder.encode(image)


def test_descriptor_of_a_pixel_follows_the_pixel():
    """Shifting the image by a whole stride shifts the descriptors with it."""
    torch.manual_seed(0)
    network = CompactNetwork(CompactShape(stem=8, widths=(8, 8, 8, 8), depths=(1, 1, 1, 1)))
    network.eval().requires_grad_(False)
    image = torch.rand(1, 3, 192, 256)
    pixels = torch.rand(1, 30, 2) * torch.tensor([60.0, 40.0]) + torch.tensor([90.0, 70.0])
    shifted = torch.roll(image, (32, 32), (2, 3))
    a, _ = network(image, pixels)
    b, _ = network(shifted, pixels + 32)
    assert float((a * b).sum(-1).min()) > 0.95
    c, _ = network(shifted, pixels)
    assert float((a * c).sum(-1).mean()) < float((a * b).sum(-1).mean())


def test_weights_survive_saving(tmp_path):
    shape = CompactShape(stem=8, widths=(8, 16, 8, 8), depths=(1, 0, 1, 1), dim=16)
    network = CompactNetwork(shape)
    save_compact(network, tmp_path / 'w.safetensors')
    loaded = load_compact(tmp_path / 'w.safetensors')
    assert loaded.shape == shape
    for name, value in network.state_dict().items():
        assert torch.allclose(value.float(), loaded.state_dict()[name].float(), atol=2e-3)


def test_missing_damaged_and_foreign_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match='found no file'):
        load_compact(tmp_path / 'none.safetensors')
    save_compact(CompactNetwork(CompactShape(stem=8)), tmp_path / 'w.safetensors')
    whole = (tmp_path / 'w.safetensors').read_bytes()
    (tmp_path / 'cut.safetensors').write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match='damaged'):
        load_compact(tmp_path / 'cut.safetensors')
    from safetensors.torch import save_file
    save_file({'x': torch.zeros(1)}, str(tmp_path / 'other.safetensors'))
    with pytest.raises(CheckpointError, match='architecture'):
        load_compact(tmp_path / 'other.safetensors')
