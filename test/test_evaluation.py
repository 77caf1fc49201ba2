"""Errors equal those of evo, ignore what they should, and never flatter."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from feedforward_recon.errors import DegenerateError, InputError
from feedforward_recon.evaluation import (
    absolute_trajectory_error,
    associate,
    localisation_score,
    relative_pose_error,
    straight_line_rmse,
)
from feedforward_recon.geometry.transforms import make_transform, se3_exp
from feedforward_recon.types import Trajectory

STEP_NS = 66_666_667


def walk(count=40, seed=0):
    """A smooth curved walk at 15 Hz."""
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.normal(size=(count, 6)) * 0.02, 0) * [1, 1, 1, 0.3, 0.3, 0.3]
    poses = np.eye(4) @ se3_exp(np.cumsum(steps, 0))
    return Trajectory(1_700_000_000_000_000_000 + STEP_NS * np.arange(count), poses)


def noisy(trajectory, seed=1, sigma=0.03):
    rng = np.random.default_rng(seed)
    return Trajectory(trajectory.stamps_ns, trajectory.T_map_cam
                      @ se3_exp(rng.normal(size=(len(trajectory), 6)) * sigma))


MOVED = se3_exp(np.array([3.0, -1, 2, 0.4, 1.2, -0.7]))


@pytest.mark.parametrize(('alignment', 'scale'), [('se3', 1.0), ('sim3', 0.1), ('sim3', 25.0)])
def test_error_does_not_see_the_map_frame(alignment, scale):
    truth = walk()
    estimated = noisy(truth)
    plain = absolute_trajectory_error(estimated, truth, alignment)
    moved = absolute_trajectory_error(estimated.transformed(MOVED, scale), truth, alignment)
    assert moved.rmse == pytest.approx(plain.rmse, rel=1e-9)
    assert moved.rotation_median_deg == pytest.approx(plain.rotation_median_deg, rel=1e-6)
    assert moved.scale == pytest.approx(plain.scale / scale)


def test_perfect_trajectory_has_no_error_and_one_without_alignment_has():
    truth = walk()
    moved = truth.transformed(MOVED)
    assert absolute_trajectory_error(moved, truth).rmse < 1e-9
    assert relative_pose_error(moved, truth).translation_rmse < 1e-9
    assert absolute_trajectory_error(moved, truth, 'none').rmse > 1
    assert absolute_trajectory_error(truth, truth, 'none').max == 0


@pytest.mark.parametrize('alignment', ['se3', 'sim3'])
def test_orientations_on_a_straight_walk_are_not_charged_for_positions(alignment):
    orientations = walk().T_map_cam[:, :3, :3]
    rng = np.random.default_rng(0)
    centres = np.arange(40)[:, None] * [0, 0, 0.5] + 0.01 * rng.normal(size=(40, 3))
    truth = Trajectory(walk().stamps_ns, make_transform(orientations, centres))
    noise = 0.05 * rng.normal(size=(40, 3))
    estimated = Trajectory(truth.stamps_ns, make_transform(orientations, centres + noise))
    error = absolute_trajectory_error(estimated.transformed(MOVED), truth, alignment)
    assert 0.05 < error.rmse < 0.1
    assert error.rotation_median_deg < 1e-4
    # One wrong orientation is still wrong, and does not spoil the others.
    turned = estimated.T_map_cam.copy()
    turned[0] = turned[0] @ se3_exp(np.array([0, 0, 0, 0, np.deg2rad(20), 0]))
    error = absolute_trajectory_error(Trajectory(truth.stamps_ns, turned), truth, alignment)
    assert 0.1 < error.rotation_median_deg < 1.0


def test_rigid_alignment_charges_a_wrong_scale():
    truth = walk()
    error = absolute_trajectory_error(truth.transformed(np.eye(4), 1.1), truth)
    assert error.rmse > 0.01
    assert error.scale == 1.0


@pytest.mark.parametrize('alignment', ['none', 'se3', 'sim3'])
def test_errors_equal_those_of_evo(alignment):
    metrics = pytest.importorskip('evo.core.metrics', reason='needs the extra [eval]')
    from evo.core.trajectory import PoseTrajectory3D
    truth = walk()
    estimated = noisy(truth).transformed(MOVED, 3.0 if alignment == 'sim3' else 1.0)

    def as_evo(trajectory):
        return PoseTrajectory3D(poses_se3=list(trajectory.T_map_cam),
                                timestamps=trajectory.stamps_ns / 1e9)
    reference, candidate = as_evo(truth), as_evo(estimated)
    if alignment != 'none':
        candidate.align(reference, correct_scale=alignment == 'sim3')

    def statistics(metric):
        metric.process_data((reference, candidate))
        return metric.get_all_statistics()
    relation = metrics.PoseRelation
    ours = absolute_trajectory_error(estimated, truth, alignment)
    position = statistics(metrics.APE(relation.translation_part))
    for name in ('rmse', 'mean', 'median', 'max'):
        assert getattr(ours, name) == pytest.approx(position[name], rel=1e-9)
    if alignment != 'none':  # orientations by their mean, not by the positions
        pairs = zip(truth.T_map_cam, candidate.poses_se3, strict=True)
        mean = Rotation.from_matrix([true[:3, :3] @ found[:3, :3].T
                                     for true, found in pairs]).mean()
        candidate.transform(make_transform(mean.as_matrix(), np.zeros(3)))
    angle = statistics(metrics.APE(relation.rotation_angle_deg))
    assert ours.rotation_median_deg == pytest.approx(angle['median'], rel=1e-6)

    relative = relative_pose_error(estimated, truth, step=3, scale=ours.scale)
    options = {'delta': 3, 'delta_unit': metrics.Unit.frames, 'all_pairs': True}
    drift = statistics(metrics.RPE(relation.translation_part, **options))
    turn = statistics(metrics.RPE(relation.rotation_angle_deg, **options))
    assert relative.translation_rmse == pytest.approx(drift['rmse'], rel=1e-9)
    assert relative.rotation_rmse_deg == pytest.approx(turn['rmse'], rel=1e-6)


def test_poses_are_matched_by_time_one_to_one():
    truth = walk(20)
    shuffled = np.random.default_rng(0).permutation(20)[:15]
    late = Trajectory(truth.stamps_ns[shuffled] + 3_000_000, truth.T_map_cam[shuffled])
    estimated, matched = associate(late, truth)
    assert len(estimated) == len(matched) == 15
    assert np.all(np.diff(matched.stamps_ns) > 0)
    np.testing.assert_array_equal(estimated.stamps_ns - matched.stamps_ns, 3_000_000)
    doubled = Trajectory(np.r_[truth.stamps_ns, truth.stamps_ns + 1],
                         np.concatenate([truth.T_map_cam, truth.T_map_cam]))
    assert len(associate(doubled, truth)[0]) == 20


def test_one_true_pose_can_be_matched():
    truth = walk(1)
    assert len(associate(truth, truth)[0]) == 1


@pytest.mark.parametrize(('estimated', 'message'), [
    (Trajectory(), 'found 0 estimated and 40 true'),
    (Trajectory(np.arange(40), walk().T_map_cam), 'same walk'),
])
def test_nothing_to_compare_is_said(estimated, message):
    with pytest.raises(InputError, match=message):
        absolute_trajectory_error(estimated, walk())


def test_wrong_requests_are_refused():
    truth = walk(10)
    with pytest.raises(InputError, match="'affine'"):
        absolute_trajectory_error(truth, truth, 'affine')
    with pytest.raises(InputError, match='more than 10 matched'):
        relative_pose_error(truth, truth, step=10)
    still = Trajectory(truth.stamps_ns, np.tile(np.eye(4), (10, 1, 1)))
    with pytest.raises(DegenerateError):
        absolute_trajectory_error(still, truth)


def test_straight_line_baseline_is_blind_guessing():
    stamps = np.cumsum(np.random.default_rng(0).integers(1, 9, 30)) * STEP_NS
    velocity = np.array([1.0, -0.2, 0.1])
    centres = stamps[:, None] / 1e9 * velocity
    straight = Trajectory(stamps, make_transform(np.eye(3), centres))
    assert straight_line_rmse(straight) < 1e-9
    bent = make_transform(np.eye(3), centres + [0, 0, 1] * np.sin(np.arange(30))[:, None])
    assert straight_line_rmse(Trajectory(stamps, bent)) == pytest.approx(0.7, abs=0.1)
    truth = walk()
    assert absolute_trajectory_error(truth, truth).straight_line_rmse == straight_line_rmse(truth)


def test_localisation_counts_missing_answers_against_the_score():
    truth = walk(8).T_map_cam
    shift = [0.005, 0.015, 0.04, 0.08, 0.2, 9.0]
    answers = [make_transform(np.eye(3), [0, 0, s]) @ truth[i] for i, s in enumerate(shift)]
    score = localisation_score([*answers, None, None], truth)
    assert (score.queries, score.localised) == (8, 6)
    assert score.recall == pytest.approx((1 / 8, 2 / 8, 3 / 8, 4 / 8))
    assert score.within(0.05, 5.0) == score.recall[2]
    assert score.median_m == pytest.approx(0.14)
    assert score.median_deg == pytest.approx(0, abs=1e-4)
    nothing = localisation_score([None] * 8, truth)
    assert nothing.median_m == nothing.median_deg == np.inf
    assert nothing.recall == (0, 0, 0, 0)


def test_a_right_place_seen_the_wrong_way_is_wrong():
    truth = np.eye(4)[None]
    turned = se3_exp(np.array([0, 0, 0, 0, np.deg2rad(7), 0]))
    score = localisation_score([turned], truth)
    assert score.median_deg == pytest.approx(7)
    assert score.recall == (0, 0, 0, 1)


@pytest.mark.parametrize('answers', [[], [None]])
def test_counts_must_agree(answers):
    with pytest.raises(InputError, match='one answer per query'):
        localisation_score(answers, np.zeros((0, 4, 4)))
