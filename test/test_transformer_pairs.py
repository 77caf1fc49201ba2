"""Pairs of photos from a network: with one that is right, and with the smallest that ships."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_model_combinations import SMALL
from test_reconstruction import CONFIG, SETTINGS, as_files, error_of, views

from feedforward_recon.cli import main
from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.errors import CheckpointError, ConfigError
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, pose_error, se3_exp, transform_points
from feedforward_recon.model import collection as collection_module
from feedforward_recon.model import pi3
from feedforward_recon.model import predictor as predictor_module
from feedforward_recon.model.collection import CollectionNetwork
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.configs import build, network_of
from feedforward_recon.model.predictor import (
    NetworkPredictor,
    as_prediction,
    load_predictor,
    read,
)
from feedforward_recon.model.preprocess import PreparedImage, crop, stacked
from feedforward_recon.model.ray_collection import RayCollectionNetwork
from feedforward_recon.model.vit import PATCH, normalised
from feedforward_recon.reconstruction.agreement import agreeing
from feedforward_recon.reconstruction.comparisons import Comparisons, compared
from feedforward_recon.reconstruction.decoders import pair_decoder, pair_network
from feedforward_recon.reconstruction.pairs import MIN_INLIERS, CompactPairs
from feedforward_recon.reconstruction.parts import PhotoSet
from feedforward_recon.reconstruction.pipeline import assembled
from feedforward_recon.reconstruction.shots import shot_of
from feedforward_recon.reconstruction.transformer_pairs import TransformerPairs
from feedforward_recon.session.offline import quiet
from feedforward_recon.session.photo_reading import read_photos
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.synthetic import Room
from feedforward_recon.types import Frame, Prediction, Trajectory

CAMERA = Camera.from_fov(70.0, (320, 240))
TRANSFORMER = replace(CONFIG, reconstruction=ReconstructionConfig(decoder='transformer', batch=5))
UNIT = 0.4  # of the oracle's answers, metres
ENCODER = CompactEncoder.load(config=CONFIG.encoder)


@dataclass
class Oracle:
    """Says of each pair what is there, in the frame of its first image.

    turned: rotations of its answers are so much off, radians. asked: the batches.
    """

    poses: np.ndarray
    depth: np.ndarray
    placed: list[PreparedImage]
    turned: float = 0.0
    asked: list[int] = field(default_factory=list)

    def predict(self, windows):
        self.asked.append(len(windows))
        return [self._said(list(window)) for window in windows]

    def _said(self, window):
        T = np.stack([inverse(self.poses[window[0]]) @ self.poses[i] for i in window])
        T[:, :3, 3] /= UNIT
        T[1] = T[1] @ se3_exp(np.r_[0, 0, 0, 0, self.turned, 0])
        depth = self.depth[window] / UNIT
        return Prediction(T, np.stack([CAMERA.K] * 2), depth, np.full_like(depth, 20.0))


@dataclass(frozen=True)
class Views:
    """Shots of a room, their true poses, depth, and matches of all pairs."""

    shots: list
    poses: np.ndarray
    depth: np.ndarray

    def oracle(self, **settings):
        placed = [PreparedImage(np.zeros((240, 320, 3), np.uint8), (1.0, 1.0))
                  for _ in self.shots]
        return Oracle(self.poses, self.depth, placed, **settings)

    def decoder(self, batch=100, **settings):
        return TransformerPairs(self.shots, ENCODER, self.oracle(**settings), batch)


@pytest.fixture(scope='module')
def room():
    """Eight views of a walk."""
    made = Room.generate(5)
    poses = np.stack(list(made.walk(14, seed=0, fps=4.0))[:8])
    images, depth = zip(*(made.render(CAMERA, T) for T in poses), strict=True)
    encoder = CompactEncoder.load(config=CONFIG.encoder)
    shots = [shot_of(Frame(k, image, camera=CAMERA), CAMERA, encoder, 10**6)
             for k, image in enumerate(images)]
    return Views(shots, poses, np.stack(depth).astype(np.float32))


EDGES = [(i, j) for i in range(8) for j in range(i + 1, 8) if j - i < 4]


def decoded(decoder, edges=EDGES):
    found = decoder.decode(edges, [decoder.match(*edge) for edge in edges])
    assert len(found) == len(edges)
    return {edge: pair for edge, pair in zip(edges, found, strict=True) if pair is not None}


@pytest.mark.parametrize('turned', [0.0, 0.05])  # 3 degrees: its points are still right
def test_an_oracle_gives_motions_and_points(room, turned):
    pairs = decoded(room.decoder(turned=turned))
    assert len(pairs) > 12
    for (i, j), pair in pairs.items():
        T_i_j = inverse(room.poses[i]) @ room.poses[j]
        T_i_j[:3, 3] /= UNIT
        distance, turn_deg = pose_error(pair.T_i_j, T_i_j)
        assert turn_deg < 0.2 and distance < 0.05
        assert pair.has_depth and not pair.is_turn
        row, column = np.rint(room.shots[i].features.keypoints[pair.feature_i]).astype(int).T[::-1]
        true = room.depth[i][row, column] / UNIT
        off = np.abs(pair.points[:, 2] / true - 1)
        assert np.nanmedian(off) < 0.01
        assert pair.confidence.max() == pytest.approx(20 / 0.2)  # of the oracle, and of its loss
        # What is sure is right: where depth jumps, the two images contradict each other.
        assert np.quantile(off[pair.confidence > 50], 0.9) < 0.05


def test_a_batch_is_each_pair_by_itself(room):
    decoder = room.decoder()
    together = decoded(decoder)
    for edge, pair in together.items():
        alone = decoded(decoder, [edge])[edge]
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in
                   zip(vars(alone).values(), vars(pair).values(), strict=True))


def compared_with(room, decoder):
    done = Comparisons(decoder, np.zeros((8, 8)), map)
    assert done.match(np.array(EDGES)) == len(EDGES) and done.match(np.array(EDGES)) == 0
    return done


def test_pairs_are_decoded_in_batches_of_bounded_size(room):
    oracle = room.oracle()
    done = compared_with(room, TransformerPairs(room.shots, ENCODER, oracle, 4))
    assert set(done.matches) == set(EDGES)
    assert max(oracle.asked) == 4 and sum(oracle.asked) <= len(EDGES)


def test_both_decoders_say_the_same_of_a_pair(room):
    network, compact = (compared_with(room, decoder).pairs
                        for decoder in (room.decoder(), CompactPairs(room.shots, ENCODER)))
    both = network.keys() & compact.keys()
    assert len(both) > 12
    assert np.median([pose_error(network[edge].T_i_j, compact[edge].T_i_j)[1]
                      for edge in both]) < 1.5  # degrees: matches alone are that good
    for edge in both:
        a, b = network[edge], compact[edge]
        shared = np.isin(a.feature_i, b.feature_i).mean()
        assert shared > 0.7 and a.feature_i.dtype == b.feature_i.dtype
        assert a.points.shape == (len(a), 3) and a.confidence.shape == (len(a),)


def test_the_network_is_not_asked_about_images_that_share_nothing(room):
    blank = shot_of(Frame(9, np.zeros((240, 320, 3), np.uint8)), CAMERA,
                    CompactEncoder.load(config=CONFIG.encoder), 10**6)
    oracle = room.oracle()
    decoder = TransformerPairs([*room.shots, blank], ENCODER, oracle, 4)
    assert decoded(decoder, [(0, 8)]) == {} and oracle.asked == []


def test_images_of_two_places_are_no_pair_whatever_the_network_says(room):
    encoder = CompactEncoder.load(config=CONFIG.encoder)
    strangers = [shot_of(frame, CAMERA, encoder, 10**6) for frame in views(77, 4)]
    decoder = TransformerPairs([*room.shots[:4], *strangers], ENCODER, room.oracle(), 4)
    edges = [(i, j) for i in range(4) for j in range(4, 8)]
    assert decoded(decoder, edges) == {}


def test_a_pair_of_which_most_matches_disagree_is_none(room):
    decoder, rng = room.decoder(), np.random.default_rng(0)
    found = decoder.match(0, 1)
    wrong = rng.random(len(found)) < 0.85
    mixed = found.feature_j.copy()
    mixed[wrong] = rng.permutation(mixed[wrong])
    matches = replace(found, feature_j=mixed)
    assert (~wrong).sum() > 2 * MIN_INLIERS
    assert decoder.decode([(0, 1)], [matches]) == [None]
    assert CompactPairs(room.shots, ENCODER).decode([(0, 1)], [matches]) == [None]


def test_a_network_without_depth_still_says_the_motion(room):
    oracle = room.oracle()
    oracle.depth = np.zeros_like(room.depth)
    pair = decoded(TransformerPairs(room.shots, ENCODER, oracle, 4), [(0, 1)])[0, 1]
    T_i_j = inverse(room.poses[0]) @ room.poses[1]
    T_i_j[:3, 3] /= UNIT
    np.testing.assert_allclose(pair.T_i_j, T_i_j, atol=1e-9)
    assert np.isnan(pair.points).all() and not pair.confidence.any()


def test_depth_that_the_other_image_contradicts_is_not_trusted(room):
    oracle = room.oracle()
    oracle.depth = room.depth.copy()
    oracle.depth[1, :, :160] *= 1.5
    pair = decoded(TransformerPairs(room.shots, ENCODER, oracle, 4), [(0, 1)])[0, 1]
    left = room.shots[1].features.keypoints[pair.feature_j, 0] < 155
    assert left.sum() > 10 and (~left).sum() > 10
    assert pair.confidence[left].max() < 3 < np.median(pair.confidence[~left])


def test_places_in_a_prepared_image_are_found_again(room):
    """Half the size, and lines cut off at the top: the same points."""
    oracle = room.oracle()
    pair = decoded(TransformerPairs(room.shots, ENCODER, oracle, 4), [(0, 1)])[0, 1]
    image = PreparedImage(np.zeros((110, 160, 3), np.uint8), (0.5, 0.5), (0, -10))
    small = np.stack([cv2.resize(d, (160, 120), interpolation=cv2.INTER_AREA)[10:]
                      for d in room.depth])
    seen = Oracle(room.poses, small, [image] * 8)
    other = decoded(TransformerPairs(room.shots, ENCODER, seen, 4), [(0, 1)])[0, 1]
    y = room.shots[0].features.keypoints[other.feature_i, 1]
    assert np.isnan(other.points[y < 19, 2]).all() and (y < 19).any()
    _, a, b = np.intersect1d(pair.feature_i, other.feature_i, return_indices=True)
    ratio = other.points[b, 2] / pair.points[a, 2]
    assert np.nanmedian(np.abs(ratio - 1)) < 0.01


def test_pairs_keep_their_depth_when_rotations_are_averaged(room):
    pairs = decoded(room.decoder())
    kept = agreeing(room.shots, pairs)
    assert len(kept) > 12
    for (i, j), pair in kept.items():
        assert pair.has_depth
        length, before = (np.linalg.norm(p.T_i_j[:3, 3]) for p in (pair, pairs[i, j]))
        assert length == pytest.approx(before)
        row = np.isin(pairs[i, j].feature_i, pair.feature_i)
        np.testing.assert_array_equal(pairs[i, j].points[row], pair.points)
        other = pair.seen_from(j)
        assert other.has_depth
        np.testing.assert_allclose(transform_points(pair.T_i_j, other.points), pair.points,
                                   atol=1e-9)


WAYS = ['depth', 'similarity', 'rigid']  # the oracle has one unit for all pairs


@pytest.mark.parametrize('way', WAYS)
def test_poses_are_put_together_from_an_oracle(room, way):
    config = ReconstructionConfig(refine=False, accumulation=way)
    comparisons = compared(room.shots, room.decoder(), config)
    done = assembled(PhotoSet(room.shots, comparisons, config))[0]
    assert done.registered.all()
    stamps = np.arange(8)
    error = absolute_trajectory_error(Trajectory(stamps, done.part.accumulated),
                                      Trajectory(stamps, room.poses), 'sim3')
    assert error.rmse < 0.02 and error.rotation_median_deg < (0.1 if way == 'depth' else 0.3)


@pytest.mark.parametrize('way', WAYS)
def test_an_image_whose_points_are_unsure_is_reported(room, way):
    config = ReconstructionConfig(refine=False, accumulation=way)
    comparisons = compared(room.shots, room.decoder(), config)
    for edge, pair in comparisons.pairs.items():
        if 7 in edge:
            comparisons.pairs[edge] = replace(pair, confidence=np.full(len(pair), 0.05))
    done = assembled(PhotoSet(room.shots, comparisons, config))[0]
    assert done.reasons == [''] * 7 + ['TOO_FEW_SHARED']


@pytest.fixture(scope='module')
def photos():
    return views(5)


@pytest.mark.slow
def test_the_shipped_network_maps_a_rendered_room(photos):
    run = reconstruct_frames(photos, TRANSFORMER, predictor=load_predictor('tiny'))[0]
    assert len(run.scene.trajectory) == len(photos)
    assert error_of(run, photos)[0] < 0.01


def unknown(placed):
    """Intrinsics that only networks that are told some would look at."""
    return [np.eye(3)] * len(placed)


def with_angles(network):
    """The network, untrained, with a camera head that says angles of view of some camera."""
    network.camera_head.pose_branch.fc2.bias.data[-2:] = 0.25  # added four times
    return network


@pytest.fixture(scope='module')
def vggt():
    """A small network of the kind of VGGT."""
    torch.manual_seed(0)
    return NetworkPredictor(with_angles(build('vggt-tiny')))


@pytest.fixture(scope='module')
def aligning():
    """The shipped network with latent alignment that does nothing."""
    network = build('tiny', alignment=2)
    network.load_state_dict(load_predictor('tiny').network.state_dict(), strict=False)
    return NetworkPredictor(network)


@pytest.mark.parametrize('half', [None, torch.bfloat16])
def test_a_collection_is_seen_once_and_pairs_as_the_network_sees_them(vggt, photos, monkeypatch,
                                                                      half):
    monkeypatch.setattr(vggt, 'half', half)
    network = CollectionNetwork(vggt)
    images = [frame.image for frame in photos[:5]]
    placed = [network.prepared(image) for image in images]
    for one, all_ in zip(placed, crop(images, 112), strict=True):
        assert np.array_equal(one.image, all_.image) and one.scale_xy == all_.scale_xy
    monkeypatch.setattr(collection_module, 'ENCODED_AT_ONCE', 2)
    collection = network.collected(placed, unknown(placed))
    pairs = collection.predict([(0, 1), (3, 2)])
    for window, pair in zip([(0, 1), (3, 2)], pairs, strict=True):
        alone, _ = vggt.predict([placed[i].image for i in window])
        for name in ('T_world_cam', 'K', 'depth', 'confidence'):
            np.testing.assert_allclose(getattr(pair, name), getattr(alone, name), rtol=1e-4,
                                       atol=1e-5)


def test_large_photos_are_prepared_at_the_size_of_their_features(vggt, photos):
    def made(*prepare):
        with quiet('features', 1) as bar:
            return read_photos(photos[:1], ENCODER, 160 * 120, map, bar, *prepare).shots[0]

    shot = made(CollectionNetwork(vggt).prepared)
    assert shot.gray.shape == (120, 160)
    assert shot.prepared.image.shape == (84, 112, 3)
    assert shot.prepared.scale_xy == (0.7, 0.7)
    assert made().prepared is None


ALIGNED = replace(TRANSFORMER, reconstruction=ReconstructionConfig(
    decoder='transformer', batch=5, latent_alignment=True))


def test_images_are_encoded_once_however_often_the_focal_length_is_tried(aligning, photos,
                                                                       monkeypatch):
    bare = [Frame(f.stamp_ns, f.image, source=f.source) for f in photos[:8]]
    plain, encoded = aligning.network.encode, []
    monkeypatch.setattr(aligning.network, 'encode', lambda images: (
        encoded.append(images.shape[1]), plain(images))[1])
    run = reconstruct_frames(bare, ALIGNED, predictor=aligning)[0]
    assert sum(encoded) == len(bare)
    assert run.scene.keyframes[0].camera.fx == pytest.approx(CAMERA.fx, rel=0.02)


def test_photos_of_several_shapes_are_one_collection(vggt, photos):
    network = CollectionNetwork(vggt)
    tall = np.ascontiguousarray(photos[1].image[:, 60:240])
    placed = [network.prepared(image) for image in (photos[0].image, tall)]
    collection = network.collected(placed, unknown(placed))
    (said,) = collection.predict([(0, 1)])
    assert said.depth.shape == (2, 112, 112)
    assert [image.offset_xy for image in collection.placed] == [(0, 14), (0, -21)]


def asked(predictor, align):
    """The network of a collection, as settings with latent alignment or without choose it."""
    return pair_network(ReconstructionConfig(decoder='transformer', latent_alignment=align),
                        predictor)


@pytest.mark.parametrize('align', [False, True])
def test_pairs_of_a_collection_are_what_the_network_says_of_them(aligning, photos, align):
    network = asked(aligning, align)
    assert isinstance(network, RayCollectionNetwork)
    images = [frame.image for frame in photos[:4]]
    placed = [network.prepared(image) for image in images]
    told, found = CAMERA.K, CAMERA.with_lens(1.3, 0.0).K
    first = network.collected(placed, [found] * 4)
    for collection, K in ((first, found), (network.told(first, [told] * 4), told)):
        said = collection.predict([(0, 1), (3, 2)])
        for window, pair in zip([(0, 1), (3, 2)], said, strict=True):
            alone, _ = aligning.predict([images[k] for k in window], K=K)
            np.testing.assert_allclose(pair.T_world_cam, alone.T_world_cam, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                pair.K, [placed[k].prepared_K(K) for k in window], rtol=1e-6)


def test_intrinsics_are_those_of_images_with_white_around_them(aligning, photos):
    network = asked(aligning, True)
    tall = np.ascontiguousarray(photos[1].image[:, 60:240])
    placed = [network.prepared(image) for image in (photos[0].image, tall)]
    collection = network.collected(placed, [CAMERA.K] * 2)
    (said,) = collection.predict([(0, 1)])
    assert said.depth.shape[1:] == collection.placed[0].image.shape[:2]
    np.testing.assert_allclose(said.K, [image.prepared_K(CAMERA.K)
                                        for image in collection.placed], rtol=1e-6)


@pytest.mark.parametrize('name', ['vggt-tiny', 'tiny'])
def test_latent_alignment_is_used_where_it_is_asked_for(photos, name):
    torch.manual_seed(0)
    network = build(name, alignment=2)
    if name == 'vggt-tiny':
        network = with_angles(network)
    for key, parameter in network.named_parameters():
        if 'latent_alignment' in key:
            parameter.data += torch.randn_like(parameter)
    predictor = NetworkPredictor(network)
    # The last one is of something else.
    images = [*(frame.image for frame in photos[:3]), np.zeros_like(photos[3].image)]
    said = {}
    for align in (False, True):
        collections = asked(predictor, align)
        placed = [collections.prepared(image) for image in images]
        of_some = [collections.collected(placed[:count], unknown(placed[:count]))
                   for count in (3, 4)]
        said[align] = [collection.predict([(0, 1)])[0].depth for collection in of_some]
    # Another image of the collection counts with it, and not without.
    assert np.allclose(*said[False]) and not np.allclose(*said[True])
    assert not np.allclose(said[False][0], said[True][0])


@pytest.mark.parametrize(('kind', 'does'), [('vggt', 'decode'), ('pi3', 'forward')])
def test_too_little_memory_is_one_sentence(few_pixels, photos, monkeypatch, kind, does):
    predictor = of_kind(kind)
    network = pair_network(TRANSFORMER.reconstruction, predictor)
    placed = [network.prepared(frame.image) for frame in photos[:2]]
    collection = network.collected(placed, unknown(placed))

    def full(*_, **__):
        raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')
    monkeypatch.setattr(predictor.network, does, full)
    with pytest.raises(ConfigError, match=r'room for 3 times 2 images on cpu.*batch'):
        collection.predict([(0, 1)] * 3)


OF_ANY_KIND = {**SMALL, 'da3-plain': replace(SMALL['da3'], normalised=False)}
OTHER_KINDS = [name for name in OF_ANY_KIND if name != 'vggt']


@pytest.fixture
def few_pixels(monkeypatch):
    """Small networks see small images."""
    monkeypatch.setattr(pi3, 'HEAD_DIM', 64)  # of whatever size the rest is
    monkeypatch.setattr(predictor_module, 'PIXELS', 56 * 112)
    monkeypatch.setattr(predictor_module, 'LONGEST_SIDE', 112)


def of_kind(name):
    """A network of that kind whose random weights do something."""
    torch.manual_seed(0)
    network = network_of(OF_ANY_KIND[name]) if name in OF_ANY_KIND else build(name)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if isinstance(network, pi3.Pi3):  # whose intrinsics are those of its points
        rays = torch.stack(torch.meshgrid(*[torch.arange(-1, 1, 2 / PATCH)] * 2, indexing='xy'))
        network.point_head.proj.bias.data[:2 * PATCH**2] = rays.flatten()
        network.point_head.proj.weight.data *= 0.1
    return NetworkPredictor(network)


@pytest.mark.parametrize('kind', OTHER_KINDS)
def test_networks_of_other_kinds_see_each_pair_as_by_itself(few_pixels, photos, kind):
    predictor = of_kind(kind)
    network = pair_network(TRANSFORMER.reconstruction, predictor)
    images = [frame.image for frame in photos[:4]]
    placed = [network.prepared(image) for image in images]
    windows = [(0, 1), (3, 2), (0, 2)]
    collection = network.collected(placed, unknown(placed))
    for window, pair in zip(windows, collection.predict(windows), strict=True):
        # The network is asked about the same pixels, as a window of its own.
        seen = [PreparedImage(placed[k].image, (1.0, 1.0)) for k in window]
        with torch.inference_mode():
            original, _ = predictor.network(as_trained(predictor, stacked(seen)))
        alone = as_prediction([x[0] for x in read(original)], seen, seen[0].image.shape[:2])
        for name in ('T_world_cam', 'K', 'depth', 'confidence'):
            np.testing.assert_allclose(getattr(pair, name), getattr(alone, name), rtol=1e-4,
                                       atol=1e-5)
        whole, _ = predictor.predict([images[k] for k in window])
        np.testing.assert_allclose(pair.T_world_cam, whole.T_world_cam, rtol=1e-4, atol=1e-5)


def test_a_network_that_is_told_intrinsics_is_told_those_of_the_photos(photos):
    predictor = load_predictor('tiny')
    network = pair_network(TRANSFORMER.reconstruction, predictor)
    images = [frame.image for frame in photos[:2]]
    placed = [network.prepared(image) for image in images]
    told, found = CAMERA.K, CAMERA.with_lens(1.3, 0.0).K
    first = network.collected(placed, [told] * 2)
    for collection, K in ((first, told), (network.told(first, [found] * 2), found)):
        (pair,) = collection.predict([(0, 1)])
        alone, _ = predictor.predict(images, K=K)
        np.testing.assert_allclose(pair.T_world_cam, alone.T_world_cam, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(alone.K, [K] * 2, rtol=1e-6)
        np.testing.assert_allclose(pair.K, [image.prepared_K(K) for image in placed], rtol=1e-6)


def as_trained(predictor, images):
    """DA3 alone is given images whose mean and deviation are taken out."""
    takes_out = getattr(predictor.network.config, 'normalised', False)
    return normalised(images) if takes_out else images


@pytest.mark.parametrize('kind', ['pi3', 'da3'])
def test_white_is_put_around_smaller_images_of_a_pair_alone(few_pixels, photos, kind, caplog):
    network = pair_network(TRANSFORMER.reconstruction, of_kind(kind))
    tall = np.ascontiguousarray(photos[1].image[:, 60:200])
    placed = [network.prepared(image) for image in (photos[0].image, tall, photos[2].image)]
    (rows, columns), (tall_rows, tall_columns) = (p.image.shape[:2] for p in placed[:2])
    assert tall_rows > rows and tall_columns < columns
    collection = network.collected(placed, unknown(placed))
    assert collection.placed == placed
    mixed, wide = collection.predict([(0, 1), (0, 2)])
    assert wide.depth.shape == (2, rows, columns)
    assert mixed.depth.shape == (2, tall_rows, columns)
    # Pixels are those of the images, and what is outside the larger one is unknown.
    assert mixed.depth[0, :rows].all() and mixed.depth[1, :, :tall_columns].all()
    assert not mixed.depth[1, :, -((columns - tall_columns) // 2):].any()
    alone, = collection.predict([(0, 2)])
    np.testing.assert_allclose(alone.depth, wide.depth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['speed3r', 'da3'])
def test_the_decoder_asks_networks_of_any_kind_in_batches(few_pixels, room, kind, monkeypatch):
    config, predictor = TRANSFORMER.reconstruction, of_kind(kind)
    network, plain, asked = pair_network(config, predictor), predictor.windows, []
    monkeypatch.setattr(predictor, 'windows', lambda images, K: (asked.append(len(images)),
                                                                 plain(images, K))[1])
    images = [cv2.cvtColor(shot.gray, cv2.COLOR_GRAY2RGB) for shot in room.shots]
    placed = [network.prepared(image) for image in images]
    collection = network.collected(placed, [shot.camera.K for shot in room.shots])
    decoder = pair_decoder(room.shots, ENCODER, config, collection)
    assert len(decoder.decode(EDGES[:3], [decoder.match(*edge) for edge in EDGES[:3]])) == 3
    assert asked == [3]


def test_settings_choose_the_decoder(room, vggt):
    assert pair_network(ReconstructionConfig(), None) is None
    compact = pair_decoder(room.shots, ENCODER, ReconstructionConfig(), None)
    assert isinstance(compact, CompactPairs)
    config = TRANSFORMER.reconstruction
    assert pair_network(config, vggt) is not None
    decoder = pair_decoder(room.shots, ENCODER, config, room.oracle())
    assert isinstance(decoder, TransformerPairs) and decoder.batch == 5


@pytest.mark.parametrize(('changes', 'name', 'error', 'sentence'), [
    ({'decoder': 'transformer'}, None, ConfigError, 'expected a network .* --model'),
    ({}, 'tiny', ConfigError, 'beside a network, found compact'),
    ({'accumulation': 'rigid'}, None, ConfigError, 'beside .* rigid, found compact; choose simil'),
    ({'latent_alignment': True}, None, ConfigError, 'beside reconstruction.latent_alignment'),
    ({'decoder': 'transformer', 'latent_alignment': True}, 'pi3', ConfigError,
     'kind of VGGT, .* found Pi3; choose vggt, vgg-t3 or tiny, or leave latent alignment out'),
    ({'decoder': 'transformer', 'latent_alignment': True}, 'da3', ConfigError, 'found Da3'),
    ({'decoder': 'transformer', 'latent_alignment': True}, 'tiny', CheckpointError,
     'expected weights with latent alignment, found none'),
    ({'decoder': 'transformer', 'latent_alignment': True}, 'vggt-tiny', CheckpointError,
     'expected weights with latent alignment, found none')])
def test_settings_that_do_not_fit_are_one_sentence(few_pixels, changes, name, error, sentence):
    predictor = of_kind(name) if name else None
    with pytest.raises(error, match=sentence):
        reconstruct_frames([], replace(CONFIG, reconstruction=ReconstructionConfig(**changes)),
                           predictor=predictor)


@pytest.fixture(scope='module')
def folder(photos, tmp_path_factory):
    return as_files(photos, tmp_path_factory.mktemp('photos'))


def test_the_command_maps_with_a_network_and_its_alignment(aligning, folder, tmp_path, capsys):
    weights = tmp_path / 'aligned.safetensors'
    save_file(aligning.network.state_dict(), weights)
    assert main(['reconstruct', str(folder), *SETTINGS, '--model', 'tiny', '--weights',
                 str(weights), '--set', 'reconstruction.decoder=transformer',
                 '--set', 'reconstruction.latent_alignment=true',
                 '--set', 'reconstruction.neighbours=3',
                 '--out', str(tmp_path / 'map'), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['tracked'] == 14


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['--model', 'no/network'], 'found compact'),  # before it is loaded
    (['--model', 'tyny', '--set', 'reconstruction.decoder=transformer'], 'did you mean tiny'),
    (['--device', 'cuda'], 'beside a feed-forward network'),
    (['--set', 'reconstruction.decoder=transformer'], 'choose one with --model'),
    (['--set', 'reconstruction.decoder=mast3r'], 'transformer')])
def test_bad_networks_are_one_sentence(folder, tmp_path, capsys, arguments, sentence):
    assert main(['reconstruct', str(folder), '--out', str(tmp_path / 'map'), *arguments]) != 0
    assert sentence in capsys.readouterr().err.replace('\n', ' ')
    assert not (tmp_path / 'map').exists()
