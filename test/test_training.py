"""The encoder's training: pairs are true correspondences, runs resume, losses mean something."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from feedforward_recon.training import data
from feedforward_recon.training.encoder import EncoderTrainer, EncoderTraining, fit_words
from feedforward_recon.training.losses import matching_loss


def smooth_photo(seed: int) -> np.ndarray:
    """A picture whose value tells the place: any wrong correspondence shows as a difference."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0, 255, (40, 60, 3)).astype(np.float32)
    return cv2.resize(noise, (600, 400), interpolation=cv2.INTER_CUBIC).clip(0, 255) \
        .astype(np.uint8)


def _values(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    p = pixels.astype(np.float32)
    return cv2.remap(image, p[None, :, 0], p[None, :, 1], cv2.INTER_LINEAR)[0].astype(float)


def test_photo_pairs_show_the_same_point(monkeypatch):
    monkeypatch.setattr(data, 'augment_image', lambda image, rng: image)
    pairs = [data.photo_pair(smooth_photo(s), np.random.default_rng(s)) for s in range(6)]
    pairs = [p for p in pairs if p is not None]
    assert len(pairs) >= 3
    for pair in pairs:
        difference = np.abs(_values(pair.images[0], pair.pixels[0])
                            - _values(pair.images[1], pair.pixels[1]))
        shuffled = np.abs(_values(pair.images[0], pair.pixels[0][::-1])
                          - _values(pair.images[1], pair.pixels[1]))
        assert np.median(difference) < 8 < np.median(shuffled)


def test_room_pairs_show_the_same_point(monkeypatch, room_camera, room_frames):
    monkeypatch.setattr(data, 'augment_image', lambda image, rng: image)
    views = {'image': np.stack([cv2.resize(f.image, (480, 360)) for f in room_frames]),
             'depth': np.stack([cv2.resize(f.depth, (480, 360), interpolation=cv2.INTER_NEAREST)
                                for f in room_frames]),
             'K': room_camera.resized((480, 360)).K,
             'T_world_cam': np.stack([f.T_map_cam for f in room_frames])}
    drawn = [data.room_pair(views, np.random.default_rng(s)) for s in range(5)]
    pairs = [p for p in drawn if p is not None]
    assert pairs
    for pair in pairs:
        difference = np.abs(_values(pair.images[0], pair.pixels[0])
                            - _values(pair.images[1], pair.pixels[1]))
        shuffled = np.abs(_values(pair.images[0], pair.pixels[0][::-1])
                          - _values(pair.images[1], pair.pixels[1]))
        assert np.median(difference) < 0.5 * np.median(shuffled)


def test_matching_loss_is_low_for_equal_and_high_for_shuffled_descriptors():
    torch.manual_seed(0)
    desc = torch.nn.functional.normalize(torch.randn(2, 50, 32), dim=-1)
    pixels = 200 * torch.rand(2, 50, 2)
    low, mutual = matching_loss(desc, desc, pixels, pixels, 0.05, 3.0)
    high, wrong = matching_loss(desc, desc.flip(1), pixels, pixels, 0.05, 3.0)
    assert mutual.all()
    assert not wrong.any()
    assert float(low) < 0.01 < 1.0 < float(high)


def test_near_points_are_not_negatives():
    desc = torch.nn.functional.normalize(torch.ones(1, 2, 8), dim=-1)
    near = torch.tensor([[[10.0, 10.0], [11.0, 10.0]]])
    far = torch.tensor([[[10.0, 10.0], [90.0, 10.0]]])
    free, _ = matching_loss(desc, desc, near, near, 0.05, 3.0)
    strict, _ = matching_loss(desc, desc, far, far, 0.05, 3.0)
    assert float(free) < 1e-4
    assert abs(float(strict) - np.log(2)) < 1e-3


def test_training_resumes_where_it_stopped(tmp_path):
    photos = tmp_path / 'photos'
    photos.mkdir()
    for seed in range(3):
        cv2.imwrite(str(photos / f'{seed}.jpg'), smooth_photo(seed))
    def trainer(steps: int) -> EncoderTrainer:
        return EncoderTrainer(EncoderTraining(
            photos=str(photos), out=str(tmp_path / 'run'), steps=steps, pairs_per_step=1,
            save_every=1, workers=0))
    trainer(1).run()
    again = trainer(2)
    assert again.step == 1
    again.run()
    assert again.step == 2
    assert (tmp_path / 'run' / 'compact.safetensors').is_file()


def test_words_are_unit_and_cover_the_clusters():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(96, 96)))[0][:8].astype(np.float32)
    points = centres[rng.integers(8, size=800)] + 0.02 * rng.normal(size=(800, 96))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    from feedforward_recon.model.compact import CompactNetwork
    network = CompactNetwork()
    fit_words(network, points, seed=0)
    words = network.words.numpy()
    assert np.allclose(np.linalg.norm(words, axis=1), 1, atol=1e-3)
    assert np.mean((centres @ words.T).max(1) > 0.98) > 0.7
