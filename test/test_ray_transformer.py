"""The transformer that knows its cameras: tokens and cells, matches, poses, preparation."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    pose_error,
    so3_exp,
    transform_points,
)
from feedforward_recon.model import configs
from feedforward_recon.model.cell_matching import coarse_matches, matched
from feedforward_recon.model.predictor import NetworkPredictor, usual_K
from feedforward_recon.model.preprocess import whole_patches
from feedforward_recon.model.ray_cameras import pose_from_points, similar_pairs
from feedforward_recon.model.ray_stem import (
    CELL,
    PATCH,
    RayStem,
    as_maps,
    by_patch,
    cell_pixels,
)
from feedforward_recon.model.ray_transformer import RayConfig
from feedforward_recon.model.rope import patch_positions

SMALL = RayConfig(dim=32, heads=2, depth=2)
K = torch.tensor([[100.0, 0, 63.5], [0, 100.0, 47.5], [0, 0, 1]])
SIZE_HW = (96, 128)


@pytest.fixture(scope='module')
def network():
    """A small network with the shipped stem and random weights otherwise."""
    torch.manual_seed(0)
    built = configs.network_of(SMALL)
    built.stem.load_state_dict(RayStem.shipped().state_dict())
    return built


@pytest.fixture(scope='module')
def textured():
    """An image [3, H, W] whose every place looks different, larger than SIZE_HW."""
    rng = np.random.default_rng(0)
    image = sum(cv2.resize(rng.random((n, n, 3)), (256, 192), interpolation=cv2.INTER_CUBIC)
                for n in (8, 24, 64)) / 3
    return torch.from_numpy(image.clip(0, 1)).float().permute(2, 0, 1)


def views(textured, *corners):
    """Windows of SIZE_HW of the image at corners (x, y): [1, N, 3, H, W]."""
    height, width = SIZE_HW
    return torch.stack([textured[:, y:y + height, x:x + width] for x, y in corners])[None]


def test_cells_are_put_where_they_were():
    cells = torch.arange(2 * 6 * 8 * 3.0).reshape(2, 6, 8, 3)
    maps = as_maps(by_patch(cells), (3, 4))
    assert torch.equal(maps, cells.permute(0, 3, 1, 2))
    pixels = cell_pixels((48, 64)).reshape(6, 8, 2)
    assert pixels[0, 0].tolist() == [(CELL - 1) / 2] * 2
    assert (pixels[2, 5] - pixels[1, 3]).tolist() == [2 * CELL, CELL]


def test_a_fresh_network_describes_as_its_stem_does(network, textured):
    images = views(textured, (0, 0), (16, 16))
    cells, _ = network(images, K.expand(1, 2, 3, 3))
    own = as_maps(network.stem(images[0]).descriptors, (6, 8))
    assert torch.allclose(cells.descriptors[0], own, atol=1e-5)
    assert torch.allclose(cells.descriptors.norm(dim=2), torch.ones(1, 2, 12, 16), atol=1e-5)
    assert (cells.depth_confidence >= 1).all() and (cells.points_confidence >= 1).all()


@torch.no_grad()
def test_the_order_of_later_views_does_not_matter(network, textured):
    images = views(textured, (0, 0), (40, 10), (70, 60), (100, 30))
    order = [0, 3, 1, 2]
    plain, _ = network(images, K.expand(1, 4, 3, 3))
    turned, _ = network(images[:, order], K.expand(1, 4, 3, 3))
    for field in dataclasses.fields(plain):
        a, b = getattr(plain, field.name)[:, order], getattr(turned, field.name)
        assert torch.allclose(a, b, atol=1e-4), field.name
    other, _ = network(images[:, [1, 0, 2, 3]], K.expand(1, 4, 3, 3))
    assert not torch.allclose(other.points[:, 2:], plain.points[:, 2:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('attention', ['softmax', 'ttt'])
def test_a_query_leaves_the_scene_as_it_is(network, textured, attention):
    torch.manual_seed(1)
    network = configs.network_of(dataclasses.replace(SMALL, attention=attention))
    images = views(textured, (0, 0), (40, 10), (70, 60))
    _, state = network(images[:, :2], K.expand(1, 2, 3, 3))
    assert state.written == 2
    alone, after = network(images[:, 2:], K.expand(1, 1, 3, 3), state, write=False)
    both, _ = network(images[:, [2, 0]], K.expand(1, 2, 3, 3), state, write=False)
    assert after is state
    # Queries neither see each other nor themselves.
    assert torch.allclose(alone.points, both.points[:, :1], atol=1e-4)
    nothing, _ = network(images[:, 2:], K.expand(1, 1, 3, 3))
    assert not torch.allclose(alone.points, nothing.points, atol=1e-3)


@torch.no_grad()
def test_a_place_in_the_image_means_nothing_where_views_meet(network):
    block, x = network.global_blocks[0], torch.randn(1, 2 * 17, SMALL.dim)
    positions = patch_positions((3, 4), 5)
    order = torch.cat([torch.arange(5), 5 + torch.randperm(12)])
    here, there = (block(x, block.attn.empty_state(1), positions=p, frames=2, write=True)[0]
                   for p in (positions, positions[order]))
    assert torch.allclose(here, there, atol=1e-5)


def test_cells_that_are_like_many_match_none():
    descriptors = torch.nn.functional.normalize(torch.randn(2, 16, 6, 8), dim=1)
    assert len(coarse_matches((descriptors[0], descriptors[0]), 30.0)[0]) == 48
    assert not len(coarse_matches((descriptors[0], descriptors[1]), 0.1)[0])


@torch.no_grad()
def test_intrinsics_are_not_guessed(network, textured):
    """The same pixels through another lens are another scene."""
    images = views(textured, (0, 0), (40, 10))
    wide, _ = network(images, (K * torch.tensor([[0.5], [0.5], [1.0]])).expand(1, 2, 3, 3))
    plain, _ = network(images, K.expand(1, 2, 3, 3))
    assert not torch.allclose(wide.log_depth, plain.log_depth, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('shift', [(16, 0), (24, -8), (0, 40)])
def test_cells_that_show_the_same_match(network, textured, shift):
    images = views(textured, (60, 45), (60 + shift[0], 45 + shift[1]))
    cells, _ = network(images, K.expand(1, 2, 3, 3))
    i, j = coarse_matches((cells.descriptors[0, 0], cells.descriptors[0, 1]), 20.0)
    moved = (i - j) - torch.tensor(shift)
    inside = ((j - i).abs() <= torch.tensor(shift).abs() + 2 * CELL).all(1)
    assert len(i) > 40 and inside.float().mean() > 0.75
    assert moved.abs().median(0).values.max() < 1.0


@torch.no_grad()
@pytest.mark.parametrize('shift', [(0, 0), (21, -6)])
def test_shipped_weights_find_matches_to_a_fraction_of_a_cell(textured, shift):
    network = configs.load('tiny')
    images = views(textured, (60, 45), (60 + shift[0], 45 + shift[1]))
    cells, _ = network(images, K.expand(1, 2, 3, 3))
    sharpness = float(network.log_sharpness.exp())
    same = matched(network.fine_matcher, cells.descriptors[0], cells.fine[0], (0, 1), sharpness)
    off = (same.pixels_i - same.pixels_j - torch.tensor(shift)).norm(dim=1)
    assert len(off) > 60 and off.median() < 1.0 and (off < 3.0).float().mean() > 0.75
    assert off[same.deviation < same.deviation.median()].mean() < off.mean()


def test_many_views_are_matched_with_similar_ones_alone():
    """Views of one place share one part of four, wherever it lies."""
    torch.manual_seed(0)
    parts = torch.randn(16, 64, 2, 2)
    for view in range(16):
        parts[view, :, view % 2, view // 2 % 2] = torch.randn(
            64, generator=torch.Generator().manual_seed(view // 4))
    shown = torch.nn.functional.normalize(parts, dim=1).repeat_interleave(4, 2)
    shown = shown.repeat_interleave(4, 3)
    pairs = similar_pairs(shown, torch.zeros(4, 64))
    inside = {(i, j) for i in range(16) for j in range(i + 1, 16) if i // 4 == j // 4}
    assert inside <= set(pairs) and len(pairs) < 16 * 15 / 2
    assert len(similar_pairs(shown[:5], torch.zeros(4, 64))) == 10


@pytest.mark.parametrize('seed', range(3))
def test_a_pose_follows_from_world_points(seed):
    rng = np.random.default_rng(seed)
    T = make_transform(so3_exp(rng.normal(0, 0.5, 3)), rng.normal(0, 1.0, 3))
    rays = np.column_stack([rng.uniform(-0.6, 0.6, (200, 2)), np.ones(200)])
    depth = rng.uniform(1.0, 4.0, 200)
    points = transform_points(T, depth[:, None] * rays)
    found = pose_from_points(points, rays, depth, np.ones(200))
    assert np.allclose(found, T, atol=1e-6)
    # Depths that are wrong together cost nothing: directions decide.
    sure = rng.uniform(0.5, 3.0, 200)
    biased = pose_from_points(points, rays, 1.2 * depth * np.exp(0.3 * rays[:, 0]), sure)
    distance, angle_deg = pose_error(biased, T)
    assert distance < 0.01 and angle_deg < 0.2


def test_unsure_points_do_not_move_a_pose():
    rng = np.random.default_rng(3)
    T = make_transform(so3_exp(np.array([0.1, -0.3, 0.2])), np.array([0.5, 0.0, -0.2]))
    rays = np.column_stack([rng.uniform(-0.6, 0.6, (200, 2)), np.ones(200)])
    points = transform_points(T, rng.uniform(1.0, 4.0, (200, 1)) * rays)
    wrong = np.arange(200) < 60
    points[wrong] += (0.05, 0.03, 0.0)  # together, and not by so much that they are doubted
    depth = transform_points(inverse(T), points)[:, 2].clip(0.5)
    sure = np.where(wrong, 1e-3, 1.0)
    distance, angle_deg = pose_error(pose_from_points(points, rays, depth, sure), T)
    assert distance < 1e-3 and angle_deg < 0.02


@pytest.mark.parametrize('size_wh', [(640, 480), (480, 640), (1241, 376), (500, 500), (97, 64)])
def test_preparation_keeps_the_shape_and_says_where_pixels_went(size_wh):
    width, height = size_wh
    image = np.zeros((height, width, 3), np.uint8)
    cv2.circle(image, (width // 2, height // 3), min(size_wh) // 8, (255, 255, 255), -1)
    placed, = whole_patches([image], 49_152, PATCH)
    rows, columns = placed.image.shape[:2]
    assert rows % PATCH == 0 and columns % PATCH == 0 and 0.8 < rows * columns / 49_152 <= 1
    scale_x, scale_y = placed.scale_xy
    assert abs(scale_x / scale_y - 1) < 0.02
    given = usual_K((height, width))
    assert np.allclose(placed.original_K(placed.prepared_K(given)), given)
    y, x = (axis.mean() for axis in np.nonzero(placed.image[..., 0] > 127))
    there = (np.array([width // 2, height // 3]) + 0.5) * placed.scale_xy - 0.5 + placed.offset_xy
    assert np.abs(there - (x, y)).max() < 1.0


def test_a_predictor_hands_on_the_intrinsics(network, textured):
    images = [(255 * view.permute(1, 2, 0)).byte().numpy()
              for view in views(textured, (0, 0), (20, 10))[0]]
    predictor = NetworkPredictor(network)
    given = np.array([[90.0, 0, 60], [0, 95.0, 45], [0, 0, 1]])
    said, _ = predictor.predict(images, K=given)
    assert np.allclose(said.K, given) and said.depth.shape == (2, *SIZE_HW)
    assert np.allclose(said.T_world_cam[0], np.eye(4), atol=1e-6)
    guessed, _ = predictor.predict(images)
    assert np.allclose(guessed.K, usual_K(SIZE_HW))


@pytest.mark.parametrize('shape', [(1, 2, 3, 96, 120), (2, 3, 96, 128), (1, 2, 1, 96, 128)])
def test_images_of_other_sizes_are_one_sentence(network, shape):
    with pytest.raises(InputError, match='multiples of 16 px, found'):
        network(torch.zeros(shape), K.expand(1, 2, 3, 3))
