"""Losses of photos put together along a tree: closed forms, gradients, and what they train."""

import dataclasses

import numpy as np
import pytest
import torch
from small_network import SMALL

from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.transforms import se3_exp
from feedforward_recon.model.configs import network_of
from feedforward_recon.training.photo_losses import (
    PairMaps,
    accumulated_pointmaps,
    aligned_points,
    global_loss,
    photo_loss,
    pointmap_loss,
)

EDGES = [(2, 0), (2, 3), (0, 1)]  # the root is image 2
POINTS = 30


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def moved(points, seed, unit):
    T = torch.from_numpy(se3_exp(np.random.default_rng(seed).normal(size=6)))
    return unit * (points @ T[:3, :3].T + T[:3, 3])


def exact():
    """True pointmaps [N, P, 3], and pairs of them, each in a frame and a unit of its own."""
    truth = random(4, POINTS, 3)
    points = torch.stack([moved(truth[list(edge)], seed, unit) for seed, (edge, unit)
                          in enumerate(zip(EDGES, (1.0, 0.3, 4.0), strict=True))])
    return truth, PairMaps(points, 1 + random(3, 2, POINTS, seed=9).abs())


@pytest.mark.parametrize('with_scale', [True, False])
def test_alignment_is_that_of_geometry(with_scale):
    source, target, weights = random(20, 3), random(20, 3, seed=1), random(20, seed=2).abs()
    expected = align_points(source.numpy(), target.numpy(), weights.numpy(),
                            with_scale=with_scale).apply(source.numpy())
    found = aligned_points(source, target, weights, source, with_scale=with_scale)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize('mirrored', [False, True])
def test_gradients_of_an_alignment_are_those_of_differences(mirrored):
    source, weights = random(8, 3), random(8, seed=2).abs()
    target = source * torch.tensor([1.0, 1.0, -1.0 if mirrored else 1.0]) + 0.2 * random(8, 3,
                                                                                        seed=1)
    inputs = [x.requires_grad_() for x in (source, target, weights)]
    assert torch.autograd.gradcheck(lambda s, t, w: aligned_points(s, t, w, s.sin()), inputs)


def test_gradients_are_finite_where_singular_values_are_equal():
    """A regular tetrahedron: the derivative of its singular vectors does not exist."""
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]],
                           dtype=torch.float64, requires_grad=True)
    moved_ = aligned_points(corners, corners.detach(), torch.ones(4).double(), corners)
    (moved_ - random(4, 3)).norm(dim=1).sum().backward()
    assert corners.grad.isfinite().all()


def test_exact_pairs_become_the_truth():
    truth, maps = exact()
    points, confidence = accumulated_pointmaps(maps, EDGES)
    again = aligned_points(points.flatten(0, 1), truth.flatten(0, 1),
                           torch.ones(4 * POINTS).double(), points)
    torch.testing.assert_close(again, truth)
    # The root is where its first pair said, and its confidence the mean of all that was said.
    torch.testing.assert_close(points[2], maps.points[0, 0])
    sure = maps.confidence
    torch.testing.assert_close(confidence[2], (sure[0, 0] * sure[1, 0]).sqrt())
    torch.testing.assert_close(confidence[0], (sure[0, 1] * sure[2, 0]).sqrt())
    torch.testing.assert_close(confidence[1], sure[2, 1])


def test_unsure_points_hardly_move_a_pair():
    _, maps = exact()
    points, confidence = maps.points.clone(), torch.full_like(maps.confidence, 5.0)
    points[2, 0, :10] += 5
    confidence[2, 0, :10] = confidence[0, 1, :10] = 1
    found, _ = accumulated_pointmaps(PairMaps(points, confidence), EDGES)
    right, _ = accumulated_pointmaps(maps, EDGES)
    torch.testing.assert_close(found[1], right[1], atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_published_one():
    truth, maps = exact()
    valid = torch.ones(4, POINTS, dtype=torch.bool)
    points, confidence = accumulated_pointmaps(maps, EDGES)
    # Without an error nothing is left but what confidence earns.
    assert float(global_loss(points, confidence, truth, valid)) == pytest.approx(
        float(-0.2 * confidence.log().mean()))
    wrong = maps.points + 0.1
    expected = (maps.confidence * 0.1 * 3**0.5 - 0.2 * maps.confidence.log()).mean()
    pairs = pointmap_loss(wrong, maps.confidence, maps.points, torch.ones(3, 2, POINTS) > 0)
    assert float(pairs) == pytest.approx(float(expected))
    whole = photo_loss(PairMaps(wrong, maps.confidence), EDGES, maps.points, truth, valid)
    assert float(whole) == pytest.approx(float(expected) - 0.02 * float(confidence.log().mean()))


def test_points_without_truth_do_not_count():
    truth, maps = exact()
    points, confidence = accumulated_pointmaps(maps, EDGES)
    valid = torch.ones(4, POINTS, dtype=torch.bool)
    valid[:, :5] = False
    points = points.clone()
    points[:, :5] += 100
    truth[:, :5] = torch.nan
    assert float(global_loss(points, confidence, truth, valid)) == pytest.approx(
        float(-0.2 * confidence[valid].log().mean()))
    wrong = maps.points.clone()
    wrong[:, :, :5] = torch.nan
    alike = torch.ones_like(maps.confidence)
    pairs = PairMaps(maps.points, alike)
    assert float(photo_loss(pairs, EDGES, wrong, truth, valid)) == pytest.approx(0, abs=1e-9)


def test_the_global_loss_trains_the_latent_alignment():
    """What a network with another alignment says of a tree is learnt by the alignment alone."""
    torch.manual_seed(0)
    backbone = dataclasses.replace(SMALL.backbone, alignment=2)
    network = network_of(dataclasses.replace(SMALL, backbone=backbone)).requires_grad_(False)
    alignment = network.aggregator.latent_alignment
    fresh = {name: tensor.clone() for name, tensor in alignment.state_dict().items()}
    encoded = network.encode(torch.rand(1, 4, 3, 28, 28))

    def accumulated():
        said, _ = network.decode(network.aligned(encoded)[0][torch.tensor(EDGES)], (2, 2))
        maps = PairMaps(said.points.flatten(2, 3), said.points_confidence.flatten(2))
        return accumulated_pointmaps(maps, EDGES)

    for parameter in alignment.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    truth, confidence = accumulated()
    alignment.load_state_dict(fresh)
    alignment.requires_grad_()
    optimiser, losses = torch.optim.Adam(alignment.parameters(), 3e-3), []
    valid, alike = torch.ones_like(confidence).bool(), torch.ones_like(confidence)
    for _ in range(12):
        loss = global_loss(accumulated()[0], alike, truth, valid)  # the error alone
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    gradients = [parameter.grad for parameter in alignment.parameters()]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert losses[-1] < 0.5 * losses[0]
