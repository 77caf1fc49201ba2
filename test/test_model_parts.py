"""The parts of the transformers: rotations, cameras as numbers, dense heads, encoders."""

import math

import numpy as np
import pytest
import torch

from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.model.dpt import (
    DptConfig,
    DptHead,
    ResidualConvUnit,
    Scratch,
    direction_embedding,
)
from feedforward_recon.model.layers import in_chunks
from feedforward_recon.model.pi3 import fitted_intrinsics, nearest_rotation
from feedforward_recon.model.pose_encoding import (
    decode_cameras,
    encode_cameras,
    matrix_from_quat,
    quat_from_matrix,
    rigid_inverse,
    unprojected,
)
from feedforward_recon.model.reference_view import (
    balance_scores,
    choose,
    order_from,
    reordered,
)
from feedforward_recon.model.rope import patch_positions, rope_angles, rotate
from feedforward_recon.model.vit import (
    DinoV2,
    VitConfig,
    grid_of,
    resampled_positions,
    resampled_positions_by_factor,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations(count, seed=0):
    return matrix_from_quat(random(count, 4, seed=seed).double())


def test_rotation_of_a_head_is_as_published():
    token = torch.arange(8)[None] / 8
    expected = [-0.227324, 0.048007, -0.104037, 0.392359, -0.600836, 0.338505, -0.671934, 1.02062]
    found = rotate(token, torch.tensor([[2, 3]]))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_products_after_rotation_depend_on_the_difference_of_positions():
    q, k = random(7, 64).double(), random(7, 64, seed=1).double()
    where, other = torch.randint(0, 30, (2, 7, 2), generator=torch.Generator().manual_seed(2))
    shift = torch.tensor([5, 11])
    before = (rotate(q, where) * rotate(k, other)).sum(-1)
    after = (rotate(q, where + shift) * rotate(k, other + shift)).sum(-1)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)  # the angles are float32


def test_rotation_keeps_lengths_and_leaves_special_tokens_alone():
    positions = patch_positions((3, 4), special=5)
    x = random(2, 6, 2 * len(positions), 64)
    turned = rotate(x, positions)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    first, second = turned.split(len(positions), -2)
    assert torch.equal(first[..., :5, :], x[..., :5, :])
    torch.testing.assert_close(second, rotate(x[..., len(positions):, :], positions))


def test_positions_run_row_by_row():
    assert patch_positions((2, 3), special=1).tolist() == [
        [0, 0], [1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert patch_positions((1, 2), special=0, first=0).tolist() == [[0, 0], [0, 1]]


def test_angles_are_rounded_with_the_tokens():
    """The published error of bfloat16 angles, which weights expect: 0.057, mean 0.0025."""
    positions = patch_positions((37, 37), special=1)
    exact = rope_angles(positions, 64, torch.float32).cos()
    rounded = rope_angles(positions, 64, torch.bfloat16).cos().float()
    assert (exact - rounded).abs().max() == pytest.approx(0.057, abs=5e-4)
    assert (exact - rounded).abs().mean() == pytest.approx(0.0025, abs=2e-4)
    assert rotate(random(1, len(positions), 64).bfloat16(), positions).dtype == torch.bfloat16


def test_direction_embedding_is_as_published():
    expected = [-.506917, -.053135, .861995, .998587, -.297164, -.030168, .954826, .999545]
    found = direction_embedding((2, 3), 518 / 392, 8)
    np.testing.assert_allclose(found[:, 0, 0], expected, atol=1e-6)


def test_decoded_camera_is_as_published():
    encoding = torch.tensor([.1, -.2, .3, .1, .2, -.3, .9, 1.0, 1.2], dtype=torch.float64)
    pose, K = decode_cameras(encoding, (392, 518))
    np.testing.assert_allclose(pose[:3, :3], [
        [.726316, .610526, .315789], [-.526316, .789474, -.315789],
        [-.442105, .063158, .894737]], atol=1e-6)
    np.testing.assert_allclose(pose[:3, 3], [.1, -.2, .3])
    np.testing.assert_allclose(K, [[378.579224, 0, 259], [0, 358.775604, 196], [0, 0, 1]],
                               atol=1e-6)


def test_cameras_survive_encoding():
    R = torch.cat((rotations(50), torch.eye(3).double()[None],
                   matrix_from_quat(torch.eye(4).double())))  # also exact half turns
    pose = torch.eye(4).double().repeat(len(R), 1, 1)
    pose[:, :3, :3], pose[:, :3, 3] = R, random(len(R), 3, seed=3)
    fov = torch.rand(len(R), 2, generator=torch.Generator().manual_seed(4)).double() + 0.3
    encoding = torch.cat((pose[:, :3, 3], quat_from_matrix(R), fov), -1)
    again = encode_cameras(*decode_cameras(encoding, (300, 400)), (300, 400))
    torch.testing.assert_close(again, encoding, atol=1e-9, rtol=0)
    assert (again[:, 6] >= 0).all()
    torch.testing.assert_close(rigid_inverse(pose) @ pose, torch.eye(4).double().expand_as(pose))


def test_unprojected_points_are_seen_at_their_pixels():
    pose = torch.eye(4).double().repeat(2, 1, 1)
    pose[:, :3, :3], pose[:, :3, 3] = rotations(2), random(2, 3, seed=1)
    K = torch.tensor([[50., 0, 9], [0, 60, 7], [0, 0, 1]]).double().expand(2, 3, 3)
    depth = 1 + torch.rand(2, 15, 20, generator=torch.Generator().manual_seed(0)).double()
    points = unprojected(depth, pose, K).flatten(1, 2)  # [2, HW, 3]
    seen = (points @ pose[:, :3, :3].mT + pose[:, None, :3, 3]) @ K.mT
    torch.testing.assert_close(seen[..., 2].view_as(depth), depth)
    pixels = (seen[..., :2] / seen[..., 2:]).view(2, 15, 20, 2)
    torch.testing.assert_close(pixels[1, 4, 13], torch.tensor([13., 4]).double())


def test_field_of_view_of_zero_is_held_at_the_limit():
    _, K = decode_cameras(torch.tensor([0., 0, 0, 0, 0, 0, 1, 0, 0]), (56, 70), 1e-6)
    assert K[0, 0] == pytest.approx(3.5e7) and K[1, 1] == pytest.approx(2.8e7)


def test_nearest_rotation_returns_rotations_and_ignores_row_lengths():
    R = rotations(20)
    torch.testing.assert_close(nearest_rotation(R), R)
    scaled = R * torch.tensor([2.0, 0.5, 7.0]).double()[:, None]
    torch.testing.assert_close(nearest_rotation(scaled), R)
    found = nearest_rotation(-R)
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(20).double())


def test_intrinsics_come_out_of_a_point_map():
    K = torch.tensor([[300., 0, 33], [0, 310, 28], [0, 0, 1]])
    v, u = torch.meshgrid(torch.arange(56.), torch.arange(70.), indexing='ij')
    rays = torch.stack(((u - 33) / 300, (v - 28) / 310, torch.ones_like(u)), -1)
    depth = 1 + torch.rand(56, 70, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fitted_intrinsics(rays * depth), K, rtol=1e-4, atol=1e-3)


def test_skip_of_a_residual_unit_is_rectified_only_where_the_original_does_it():
    x = random(1, 4, 5, 5)
    for rectify in (True, False):
        unit = ResidualConvUnit(4, rectify)
        torch.nn.init.zeros_(unit.conv2.weight)
        torch.nn.init.zeros_(unit.conv2.bias)
        assert torch.equal(unit(x), x.relu() if rectify else x)


def test_chunks_of_frames_do_not_change_a_dense_head():
    torch.manual_seed(0)
    config = DptConfig(16, 8, (4, 8, 12, 16))
    levels = [random(5, 6, 16, seed=i) for i in range(4)]
    head = DptHead(config, Scratch(config, 2))
    together = head(levels, (2, 3))
    apart, = in_chunks(lambda *part: (head(part, (2, 3)),), levels, 2)
    assert together.shape == (5, 28, 42, 2)
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize('resample', [resampled_positions, resampled_positions_by_factor])
def test_position_embedding_is_resampled_only_for_other_grids(resample):
    table = random(1, 1 + 25, 8)
    assert resample(table, (5, 5)) is table
    other = resample(table, (4, 7))
    assert other.shape == (1, 1 + 28, 8)
    assert torch.equal(other[:, 0], table[:, 0])


def test_encoder_sees_each_image_alone():
    torch.manual_seed(0)
    encoder = DinoV2(VitConfig(32, 2, 2, grid=3)).eval()
    images = torch.rand(3, 3, 28, 42)
    with torch.inference_mode():
        together = encoder(images)
        assert together.shape == (3, 6, 32)
        torch.testing.assert_close(encoder(images[1:2]), together[1:2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('size', [(13, 28), (28, 30), (0, 14)])
def test_sides_must_be_multiples_of_a_patch(size):
    with pytest.raises(InputError, match=r'multiples of 14'):
        grid_of(torch.zeros(1, 3, *size))


def test_reference_view_is_the_same_view_in_any_order():
    tokens = random(1, 6, 32)
    chosen = int(choose(tokens, 'saddle_balanced'))
    for order in ([3, 1, 0, 5, 4, 2], [5, 4, 3, 2, 1, 0]):
        assert order[int(choose(tokens[:, order], 'saddle_balanced'))] == chosen
    assert int(balance_scores(tokens).argmin()) == chosen
    assert int(choose(tokens, 'middle')) == 3
    with pytest.raises(ConfigError, match='best'):
        choose(tokens, 'best')


def test_reordering_is_undone_by_its_inverse():
    order = order_from(torch.tensor([2, 0]), 4)
    assert order.tolist() == [[2, 0, 1, 3], [0, 1, 2, 3]]
    x = random(2, 4, 5)
    assert torch.equal(reordered(reordered(x, order), order.argsort(-1)), x)
    assert torch.equal(reordered(x, order)[0, 0], x[0, 2])
    assert math.isclose(float(reordered(x, order).sum()), float(x.sum()), rel_tol=1e-5)
