"""The benchmark of thousands of photos replays a collection that is known."""

import numpy as np
import pytest

from benchmarks import photo_scale
from benchmarks.photo_scale import (
    ALIKE_M,
    SEEN_M,
    STEP_M,
    collection,
    extrapolated,
    global_descriptors,
    measure,
)


def test_similarity_falls_off_with_distance():
    positions = np.random.default_rng(0).uniform(-2, 2, (40, 3))
    codes = global_descriptors(positions, np.random.default_rng(1))
    distance = np.linalg.norm(positions[:, None] - positions, axis=2)
    np.testing.assert_allclose(codes @ codes.T, np.exp(-(distance / ALIKE_M)**2 / 2), atol=0.12)


def test_images_see_what_is_before_them_and_pairs_share_it():
    shots, decoder, poses = collection(80)
    assert min(len(shot.features) for shot in shots) > 80
    distance = np.linalg.norm(poses[:, None, :3, 3] - poses[0, :3, 3], axis=2)[:, 0]
    near, far = np.argsort(distance)[1], int(distance.argmax())
    matches = decoder.match(0, int(near))
    assert len(matches) > 50 and len(decoder.match(0, far)) == 0 and distance[far] > SEEN_M
    assert abs(distance[near] - STEP_M) < 0.6
    assert decoder.decode([(0, int(near))], [matches])[0] is not None
    assert decoder.cpu_seconds > 0


@pytest.mark.parametrize('refine', [False, True])
def test_a_small_collection_is_put_together(refine):
    row = measure(50, refine)
    assert row['registered'] == 50 and row['error']['rotation_median_deg'] < 0.3
    assert row['pairs'] > 150 and row['found'] == 1
    assert all(np.isfinite(row[key]) for key in ('retrieval_ms', 'together_ms', 'peak_mb'))


def test_rows_are_extrapolated_by_their_power_law(monkeypatch):
    def point(count):
        times = ('retrieval_ms', 'together_ms', 'search_ms', 'exact_ms')
        return {'images': count, 'peak_mb': 2.0, **dict.fromkeys(times, 3e-4 * count**0.5)}
    monkeypatch.setattr(photo_scale, 'in_own_process', point)
    rows = dict(photo_scale.run())
    last = rows['100000 images | extrapolated']
    assert last['together_ms'] == pytest.approx(3e-4 * 100_000**0.5)
    assert last['peak_mb'] == pytest.approx(2.0)
    assert extrapolated([point(10), point(20)], 40)['exact_ms'] == pytest.approx(3e-4 * 40**0.5)
