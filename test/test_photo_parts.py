"""Pairs, accumulation, tracks and patches: parts of a reconstruction, on scenes that are known."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from oracle import CAMERA, OracleScene

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, se3_exp, transform_points
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.reconstruction.accumulation import accumulate
from feedforward_recon.reconstruction.agreement import agreeing
from feedforward_recon.reconstruction.completion import MIN_OBSERVATIONS, completed
from feedforward_recon.reconstruction.pairs import CompactPairs, PairGeometry, with_rotation
from feedforward_recon.reconstruction.parts import Part, PhotoSet
from feedforward_recon.reconstruction.refinement import (
    FINE,
    ROUGH,
    refined,
    triangulated,
    with_tracks,
)
from feedforward_recon.reconstruction.registration import agreeing_with, placed_by_points
from feedforward_recon.reconstruction.scene_graph import minimum_spanning_tree
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.reconstruction.subpixel import patches_aligned
from feedforward_recon.reconstruction.tracks import PointTracks, tracks_of
from feedforward_recon.types import Trajectory

ENCODER = CompactEncoder.load()
CIRCLE = 10  # cameras half a metre apart on an arc, looking at the scene


def arc(count=CIRCLE):
    """Poses on an arc around the middle of the oracle's scene."""
    middle = np.array([0, 0, 3.5])
    poses = []
    for angle in np.linspace(-0.5, 0.5, count):
        turn = se3_exp(np.r_[0, 0, 0, 0, angle, 0.05 * np.sin(7 * angle)])
        around = np.eye(4)
        around[:3, 3] = middle
        poses.append(around @ turn @ inverse(around))
    return np.stack(poses)


def shot(features, camera=CAMERA, gray=None):
    colours = np.zeros((len(features), 3), np.uint8)
    gray = np.zeros(camera.size_wh[::-1], np.uint8) if gray is None else gray
    return Shot(features, camera, camera.normalise(features.keypoints), colours, gray,
                camera.size_wh)


def decoded(decoder, i, j):
    """One pair by itself."""
    return decoder.decode([(i, j)], [decoder.match(i, j)])[0]


@pytest.fixture(scope='module')
def scene():
    """Shots of the oracle's scene from an arc, true poses, and all pairs that are decoded."""
    world, poses = OracleScene.generate(0, count=900), arc()
    shots = [shot(world.features(pose, seed)[0]) for seed, pose in enumerate(poses)]
    decoder = CompactPairs(shots, ENCODER)
    edges = [(i, j) for i in range(CIRCLE) for j in range(i + 1, CIRCLE)]
    matches = {edge: decoder.match(*edge) for edge in edges}
    pairs = dict(zip(edges, decoder.decode(edges, list(matches.values())), strict=True))
    return shots, poses, matches, {edge: pair for edge, pair in pairs.items() if pair is not None}


def error_of(T_map_cam, poses, images):
    """ATE of some images after a similarity, metres; and the median turn, degrees."""
    error = absolute_trajectory_error(Trajectory(images, T_map_cam[images]),
                                      Trajectory(images, poses[images]), 'sim3')
    return error.rmse, error.rotation_median_deg


def chain(count=CIRCLE):
    return [(k, k + 1) for k in range(count - 1)]


def test_pairs_are_those_of_the_scene(scene):
    shots, poses, _, pairs = scene
    assert len(pairs) > 30
    for (i, j), pair in pairs.items():
        T_i_j = inverse(poses[i]) @ poses[j]
        better = with_rotation(pair, shots, T_i_j[:3, :3])
        unit = T_i_j[:3, 3] / np.linalg.norm(T_i_j[:3, 3])
        assert better.T_i_j[:3, 3] @ unit > np.cos(np.deg2rad(3))
        assert np.allclose(np.linalg.norm(better.T_i_j[:3, 3]), 1)


def test_a_pair_from_its_other_image_is_the_same_pair(scene):
    pair = next(iter(scene[3].values()))
    other = pair.seen_from(pair.j)
    assert (other.i, other.j) == (pair.j, pair.i)
    np.testing.assert_allclose(other.T_i_j @ pair.T_i_j, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(transform_points(pair.T_i_j, other.points), pair.points, atol=1e-9)
    assert other.seen_from(pair.j) is other


def exact(scene):
    """Pairs with true motions, each in a unit of its own."""
    _, poses, _, pairs = scene
    rng = np.random.default_rng(0)
    out = {}
    for (i, j), pair in pairs.items():
        T_i_j, unit = inverse(poses[i]) @ poses[j], rng.uniform(0.2, 5.0)
        length = np.linalg.norm(T_i_j[:3, 3])
        T_i_j[:3, 3] *= unit
        out[i, j] = replace(pair, T_i_j=T_i_j, points=pair.points * length * unit)
    return out


def test_units_of_pairs_are_brought_together_along_a_tree(scene):
    shots, poses, _, _ = scene
    done = accumulate(shots, exact(scene), 0, chain())
    assert done.registered.all()
    rmse, turn_deg = error_of(done.T_map_cam, poses, np.arange(CIRCLE))
    assert rmse < 0.02 and turn_deg < 1e-6


def test_an_image_without_a_parent_is_placed_beside_another(scene):
    shots, poses, _, _ = scene
    done = accumulate(shots, exact(scene), 0, chain()[:3])  # the tree ends after four images
    assert done.registered.all()
    assert error_of(done.T_map_cam, poses, np.arange(CIRCLE))[0] < 0.02


def test_an_image_that_shares_too_little_stays_out(scene):
    shots = scene[0]
    pairs = {edge: pair for edge, pair in exact(scene).items() if max(edge) < 9}
    # The only pair of the last image shows features that nobody else has seen.
    nothing = np.full(40, np.nan)
    T = np.eye(4) + 0.1 * np.eye(4, k=3)
    pairs[8, 9] = PairGeometry(8, 9, np.arange(40), np.arange(40), T, np.stack([nothing] * 3, 1),
                               np.zeros(40))
    done = accumulate(shots, pairs, 0, chain())
    assert done.registered.tolist() == [True] * 9 + [False]


def test_a_turn_on_the_spot_keeps_the_place_and_hands_on_what_is_known(scene):
    shots, poses, _, _ = scene
    pairs = exact(scene)
    turn = se3_exp(np.r_[0, 0, 0, 0, 0.1, 0])
    world = OracleScene.generate(0, count=900)
    shots = [*shots, shot(world.features(poses[4] @ turn, 99)[0])]
    decoder = CompactPairs(shots, ENCODER)
    for i in (4, 6):
        pairs[i, CIRCLE] = decoded(decoder, i, CIRCLE)
    assert pairs[4, CIRCLE].is_turn and not pairs[6, CIRCLE].is_turn
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, CIRCLE), (CIRCLE, 6)]
    done = accumulate(shots, pairs, 0, edges)
    assert done.registered.all()
    np.testing.assert_array_equal(done.T_map_cam[CIRCLE, :3, 3], done.T_map_cam[4, :3, 3])
    assert error_of(done.T_map_cam, poses, np.arange(CIRCLE))[0] < 0.05


def test_what_is_learnt_later_reaches_images_from_the_same_place(scene):
    """A turn before anything has a point: images beside its other end still get the unit."""
    shots, poses, _, _ = scene
    world = OracleScene.generate(0, count=900)
    turned = poses[0] @ se3_exp(np.r_[np.zeros(4), 0.1, 0])
    shots = [*shots, *(shot(world.features(pose, 98 + k)[0]) for k, pose in
                       enumerate((turned, poses[0])))]
    one, two = CIRCLE, CIRCLE + 1
    decoder, pairs = CompactPairs(shots, ENCODER), {(0, 1): exact(scene)[0, 1]}
    for i, j in ((0, two), (one, two)):
        pairs[i, j] = decoded(decoder, i, j)
        assert pairs[i, j].is_turn
    found = decoded(decoder, 3, one)
    pairs[3, one] = with_rotation(found, shots, (inverse(poses[3]) @ turned)[:3, :3])
    done = accumulate(shots, pairs, 0, [(0, two), (two, one), (0, 1), (one, 3)])
    assert np.flatnonzero(done.registered).tolist() == [0, 1, 3, one, two]
    assert error_of(done.T_map_cam, poses, np.array([0, 1, 3]))[0] < 0.05


def pair_of(i, j, matches):
    """A pair with nothing but its matches [(feature of i, feature of j)]."""
    a, b = np.array(matches).T
    return PairGeometry(i, j, a, b, np.eye(4), np.zeros((len(a), 3)), np.ones(len(a)))


def test_tracks_join_what_pairs_match_and_see_an_image_once():
    features = OracleScene.generate(0, count=300).features(np.eye(4), 0)[0].select(np.arange(9))
    shots = [shot(features)] * 3
    tracks = tracks_of(shots, [pair_of(0, 1, [(0, 0), (1, 1), (2, 2)]),
                               pair_of(1, 2, [(0, 0), (1, 5)]),
                               # 0 and 3 of the first image are not one point.
                               pair_of(0, 2, [(3, 0)])])
    found = sorted(tuple(sorted(zip(tracks.image[tracks.point == p].tolist(),
                                    tracks.feature[tracks.point == p].tolist(), strict=True)))
                   for p in range(tracks.count))
    assert found == [((0, 0), (1, 0), (2, 0)), ((0, 1), (1, 1), (2, 5)), ((0, 2), (1, 2))]
    np.testing.assert_array_equal(tracks.px, features.keypoints[tracks.feature])
    assert tracks_of(shots, []).count == 0


def test_selected_tracks_have_two_views_and_are_numbered_anew():
    tracks = PointTracks(np.array([0, 1, 2, 0, 1]), np.arange(5), np.array([0, 0, 0, 1, 1]),
                         np.zeros((5, 2)), 2)
    kept = tracks.select(np.array([False, False, True, True, True]))
    assert (kept.count, kept.point.tolist(), kept.image.tolist()) == (1, [0, 0], [0, 1])


def structure_of(scene, T_map_cam, cameras=None):
    shots, _, _, pairs = scene
    tracks = tracks_of(shots, pairs.values())
    cameras = cameras or [s.camera for s in shots]
    return triangulated(T_map_cam, cameras, tracks)


def test_refinement_brings_disturbed_poses_back(scene):
    _, poses, _, _ = scene
    rng = np.random.default_rng(0)
    disturbed = poses @ se3_exp(rng.normal(0, 0.02, (CIRCLE, 6)))
    before = error_of(disturbed, poses, np.arange(CIRCLE))[0]
    structure = refined(structure_of(scene, disturbed), (*ROUGH, *FINE))
    after, turn_deg = error_of(structure.T_map_cam, poses, np.arange(CIRCLE))
    assert after < 0.1 * before and turn_deg < 0.05
    assert structure.error_px.max() < 2 * FINE[-1].limit_px
    assert (np.bincount(structure.tracks.point) >= 2).all()


@pytest.mark.parametrize(('way_m', 'most'), [((0.36, 0, 0.48), 0.08), ((0.4, -0.3, 0.3), 0.0)])
def test_what_moved_between_two_visits_moves_no_pose_and_leaves_few_points(way_m, most):
    """A third of the points stands elsewhere in every second image, as one thing.

    Along the epipolar lines two images cannot tell; across them they can.
    """
    world, poses = OracleScene.generate(0, count=900), arc()
    moved = world.points[:, 0] > 1.0
    assert 0.3 < moved.mean() < 0.4
    visits = world, OracleScene(world.points + moved[:, None] * way_m, world.descriptors)
    shots = [shot(visits[k % 2].features(pose, k)[0]) for k, pose in enumerate(poses)]
    decoder, edges = CompactPairs(shots, ENCODER), list(combinations(range(CIRCLE), 2))
    found = decoder.decode(edges, [decoder.match(*edge) for edge in edges])
    pairs = agreeing(shots, {(pair.i, pair.j): pair for pair in found if pair is not None})
    tree = minimum_spanning_tree(CIRCLE, np.array(list(pairs)), np.array(
        [1 / len(pair) for pair in pairs.values()]), 0)
    placed = accumulate(shots, pairs, 0, tree.edges)
    before = triangulated(placed.T_map_cam, [CAMERA] * CIRCLE, tracks_of(shots, pairs.values()))
    after = refined(before, (*ROUGH, *FINE))
    rmse, turn_deg = error_of(after.T_map_cam, poses, np.arange(CIRCLE))
    assert rmse < 0.003 and turn_deg < 0.05
    assert in_both_visits(after.tracks, shots, world, moved) <= most


def in_both_visits(tracks, shots, world, moved):
    """The share of points that show a thing that moved, both before and after it did."""
    shown = np.zeros(len(tracks), int)
    for image, rows in tracks.by_image():
        codes = shots[image].features.descriptors[tracks.feature[rows]]
        shown[rows] = np.argmax(codes @ world.descriptors.T, axis=1)
    seen = [np.bincount(tracks.point, moved[shown] & (tracks.image % 2 == visit)) > 0
            for visit in range(2)]
    return np.logical_and(*seen).mean()


def test_refinement_finds_the_focal_length(scene):
    shots, poses, _, _ = scene
    wrong = CAMERA.with_lens(1.1, 0.0)
    structure = structure_of(scene, poses, [wrong] * len(shots))
    structure = refined(structure, (*ROUGH, *FINE), ('focal',))
    assert structure.cameras[0].fx == pytest.approx(CAMERA.fx, rel=0.01)


def part_with(structure):
    """A part in which all images have a pose."""
    every = np.ones(CIRCLE, bool)
    return Part(every, structure, set(range(CIRCLE)), minimum_spanning_tree(
        CIRCLE, np.array(chain()), np.ones(CIRCLE - 1), 0), structure.T_map_cam)


def test_tracks_made_anew_have_what_motions_of_pairs_left_out_and_lose_no_image(scene):
    shots, poses, matches, pairs = scene
    photos = PhotoSet(shots, SimpleNamespace(matches=matches), ReconstructionConfig())
    few = [replace(pair, feature_i=pair.feature_i[::3], feature_j=pair.feature_j[::3],
                   points=pair.points[::3], confidence=pair.confidence[::3])
           for pair in map(pairs.get, chain())]
    every = np.ones(CIRCLE, bool)
    rough = refined(triangulated(poses, [CAMERA] * CIRCLE, tracks_of(shots, few)), ROUGH)
    anew, registered = completed(photos, part_with(rough), every)
    assert registered.all() and len(anew.tracks) > 2 * len(rough.tracks)
    before, after = (error_of(structure.T_map_cam, poses, np.arange(CIRCLE))[0]
                     for structure in (rough, anew))
    assert after < 0.5 * before
    wrong = rough.T_map_cam.copy()
    wrong[3] = wrong[3] @ se3_exp(np.r_[0, 0, 0, 0.3, 0, 0.2])
    astray = replace(rough, T_map_cam=wrong)
    same, registered = completed(photos, part_with(astray), every)
    assert same is astray and registered.all()


def test_an_image_that_sees_little_keeps_no_other_from_better_tracks(scene):
    shots, poses, matches, pairs = scene
    photos = PhotoSet(shots, SimpleNamespace(
        matches={edge: both for edge, both in matches.items() if 9 not in edge}),
        ReconstructionConfig())
    tracks = tracks_of(shots, map(pairs.get, chain()))
    last = np.flatnonzero(tracks.image == 9)
    rough = triangulated(poses, [CAMERA] * CIRCLE, tracks.select(
        ~np.isin(np.arange(len(tracks)), last[MIN_OBSERVATIONS - 5:])))
    anew, registered = completed(photos, part_with(rough), np.arange(CIRCLE) < 9)
    assert anew is not rough and not (anew.tracks.image == 9).any()
    assert registered.tolist() == [True] * 9 + [False]


def test_an_image_is_placed_by_the_points_that_it_sees(scene):
    shots, poses, matches, _ = scene
    registered = np.arange(CIRCLE) != 5
    structure = structure_of(scene, poses)
    seen = structure.tracks.image != 5
    structure = with_tracks(structure, structure.tracks.select(seen))
    found = placed_by_points(structure, shots, registered, ~registered, matches, seed=0)
    assert list(found) == [5]
    T = inverse(poses[5]) @ found[5].T_map_cam
    assert np.linalg.norm(T[:3, 3]) < 0.03
    pairs = agreeing_with(poses, shots, registered, matches)
    assert pairs and all(5 not in edge for edge in pairs)
    wrong = poses.copy()
    wrong[3] = wrong[3] @ se3_exp(np.r_[0, 0, 0, 0.3, 0, 0.2])
    assert not any(3 in edge for edge in agreeing_with(wrong, shots, registered, matches))


def test_patches_are_found_to_a_tenth_of_a_pixel():
    """A textured wall, seen from several sides; corners are half a pixel and more off."""
    rng = np.random.default_rng(0)
    camera = Camera.from_fov(60.0, (400, 300))
    wall = cv2.GaussianBlur(rng.uniform(0, 255, (900, 1200)).astype(np.float32), (0, 0), 3.0)
    wall = ((wall - wall.min()) / np.ptp(wall) * 255)
    texel = 4.0 / 1200  # metres; the wall is 4 m wide and 4 m away
    T = np.stack([se3_exp(np.r_[x, 0.1 * x, 0, 0, -0.1 * x, roll])
                  for x, roll in ((-0.8, 0.0), (-0.3, 1.6), (0.2, -1.6), (0.7, 3.0))])
    to_wall = np.array([[texel, 0, -2.0], [0, texel, -1.5], [0, 0, 0], [0, 0, 1]])
    to_wall[2, 2] = 4.0
    grays = [cv2.warpPerspective(wall, camera.K @ inverse(pose)[:3] @ to_wall, camera.size_wh)
             for pose in T]
    points = np.column_stack([rng.uniform((-1.0, -0.7), (1.0, 0.7), (60, 2)), np.full(60, 4.0)])
    image, point = (v.ravel() for v in np.meshgrid(np.arange(4), np.arange(60)))
    true = np.concatenate([camera.project(transform_points(inverse(T[i]), points[None, p]))
                           for i, p in zip(image, point, strict=True)])
    off = rng.normal(0, 0.6, true.shape)
    tracks = PointTracks(image, np.arange(240), point, true + off, 60)
    aligned = patches_aligned([g.astype(np.uint8) for g in grays], [camera] * 4, T, tracks, points)
    rows = aligned.feature  # observations that are left, by their number
    assert len(rows) > 0.9 * 240
    # The reference keeps its own error, so what counts is that all show one point of the wall.
    def on_wall(px, images):
        rays = np.column_stack([camera.normalise(px), np.ones(len(px))])
        rays = np.einsum('nij,nj->ni', T[images, :3, :3], rays)
        start = T[images, :3, 3]
        return (start + rays * ((4 - start[:, 2]) / rays[:, 2])[:, None])[:, :2] * camera.fx / 4

    def spread_px(px, images, points_):
        at = on_wall(px, images)
        middle = np.stack([at[points_ == p].mean(0) for p in range(60)])
        return np.linalg.norm(at - middle[points_], axis=1)

    assert spread_px(true + off, image, point).max() > 1.0
    assert spread_px(aligned.px, image[rows], point[rows]).max() < 0.2


def test_a_patch_that_looks_only_partly_alike_is_not_kept():
    """Its place could be found, but something else is there, too."""
    rng = np.random.default_rng(0)
    camera = Camera.from_fov(60.0, (200, 150))
    one, other = (cv2.GaussianBlur(rng.uniform(0, 255, (150, 200)).astype(np.float32), (0, 0), 2)
                  for _ in range(2))
    T = np.stack([np.eye(4)] * 2)
    T[1, 0, 3] = 1e-6  # the same view, but for the direction from which it is seen
    points = np.column_stack([rng.uniform(-1.0, 1.0, (40, 2)), np.full(40, 4.0)])
    image, point = (v.ravel() for v in np.meshgrid(np.arange(2), np.arange(40)))
    tracks = PointTracks(image, np.arange(80), point, camera.project(points)[point], 40)

    def kept(share):
        seen = (1 - share) * one + share * other
        return len(patches_aligned([one, seen], [camera] * 2, T, tracks, points))

    assert kept(0.2) == 80 and kept(0.6) < 30


def test_what_does_not_look_like_the_reference_is_not_kept():
    rng = np.random.default_rng(0)
    camera = Camera.from_fov(60.0, (200, 150))
    grays = [cv2.GaussianBlur(rng.integers(0, 255, (150, 200)).astype(np.uint8), (0, 0), 2)
             for _ in range(2)]
    T = np.stack([np.eye(4), se3_exp(np.r_[0.2, 0, 0, 0, 0, 0])])
    points = np.column_stack([rng.uniform(-0.5, 0.5, (30, 2)), np.full(30, 4.0)])
    image, point = (v.ravel() for v in np.meshgrid(np.arange(2), np.arange(30)))
    px = np.concatenate([camera.project(transform_points(inverse(T[i]), points[None, p]))
                         for i, p in zip(image, point, strict=True)])
    tracks = PointTracks(image, np.arange(60), point, px, 30)
    assert len(patches_aligned(grays, [camera] * 2, T, tracks, points)) < 6
