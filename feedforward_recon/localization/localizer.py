"""``Localizer``: one image, one frozen memory -> a pose, or the reason why there is none.

    features -> nearest confirmed slots -> robust PnP; if few agree, of all slots and features,
                                          and of the network
             -> slots matched again around the pose, refinement -> accept or refuse;
                where the map has it in several places, a network that is sure may decide

The global candidates only have to be right often enough for the robust search; the accuracy
comes from projecting all slots with the first pose and matching again in the neighbourhood.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial import cKDTree

from feedforward_recon.config.schema import LocalizerConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.pnp import PoseFit, pnp_ransac, refine_pose
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.localization.evidence import Answer, holds, in_view, within
from feedforward_recon.localization.slot_search import Similarities, SlotSearch, paired_cosines
from feedforward_recon.memory.scene_memory import SceneMemory
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, Features, Frame, Status

# Features near a projected slot that are compared; more are farther than the radius.
NEIGHBOURS = 6
ELSEWHERE = 4.0  # times search_px, 32 px: a pose that moves the view by more is another place
# Expected error of a right point of the coordinate network: NETWORK_PX over the root of its votes,
# no less than MIN_NETWORK_PX. Below MIN_VOTES hardly any is right (docs/memory.md, Calibration).
NETWORK_PX, MIN_NETWORK_PX, MIN_VOTES = 4.0, 1.5, 0.5
# Answers of the network that there must be, and the share of them that must agree on a pose, for
# it to tell places apart that slots cannot: docs/experiments.md, The network tells places apart.
MIN_JUDGES, JUDGE_SHARE = 60, 0.6
OUTLIER_SIGMAS = 3.0  # expected errors; 99.7 % of normal errors are smaller
# A pose that moves the view by less finds the same matches again: a quarter of the time of a
# query, as accurate (docs/experiments.md, Speed of the online loop and of a query).
CONVERGED_PX = 2.0
# Times the depth within which so many percent of the matches without a pose are: beyond it are
# other rooms, whose walls the map does not know (docs/memory.md, Other rooms).
HORIZON, FARTHEST_PERCENT = 2.0, 90
SHIFT_STEP = 10  # one slot in so many is projected: hundreds are enough for a median
# Expected error of a slot match: SLOT_PX, that of a corner, and up to SLOT_PX_UNLIKE more the less
# similar the descriptors are; chosen by hand.
SLOT_PX, SLOT_PX_UNLIKE = 1.0, 5.0


@dataclass(frozen=True)
class Matches:
    """Candidate correspondences.

    points: [M, 3] in the map; pixels: [M, 2]; feature: index [M] of the feature;
    sigma_px: expected reprojection error [M].
    """

    points: np.ndarray
    pixels: np.ndarray
    feature: np.ndarray
    sigma_px: np.ndarray

    def __len__(self) -> int:
        return len(self.feature)

    def select(self, index: np.ndarray) -> Matches:
        """Candidates at ``index``."""
        return Matches(self.points[index], self.pixels[index], self.feature[index],
                       self.sigma_px[index])

    def agreeing(self, T_map_cam: np.ndarray, camera: Camera, limit_px: float) -> np.ndarray:
        """Mask [M] of candidates whose reprojection error is below ``limit_px``."""
        return within(T_map_cam, self.points, self.pixels, camera, limit_px)


@dataclass(frozen=True)
class MatchedEstimate:
    """An estimate, and the matches that agree with its pose (none without a pose)."""

    estimate: Estimate
    matches: Matches


class Localizer:
    """Finds images in a frozen memory. Keeps no state between calls."""

    def __init__(self, memory: SceneMemory, encoder: Encoder,
                 config: LocalizerConfig | None = None, camera: Camera | None = None) -> None:
        self.memory, self.encoder, self.camera = memory, encoder, camera
        self.config = config or LocalizerConfig()
        # Half precision finds the nearest slots; what is decided from them is exact.
        self._searches = [SlotSearch(memory.descriptors, memory.points, among)
                          for among in _stages(memory)]
        self._values = memory.descriptors.numpy()

    def localize(self, frame: Frame, T_map_cam_hint: np.ndarray | None = None) -> Estimate:
        """Pose of a frame in the map, or NOT_LOCALISED with the reason.

        Raises InputError when neither the frame nor the localizer has a camera.
        """
        return self.localize_matched(frame, T_map_cam_hint).estimate

    def localize_matched(self, frame: Frame, T_map_cam_hint: np.ndarray | None = None
                         ) -> MatchedEstimate:
        """``localize`` with the matches that agree with the pose.

        Raises InputError when neither the frame nor the localizer has a camera.
        """
        started = time.perf_counter()
        camera = self.camera_of(frame)
        features = self.encoder.encode(frame.image)
        found = self.localize_features(features, camera, T_map_cam_hint)
        estimate = replace(found.estimate, stamp_ns=frame.stamp_ns, source=frame.source,
                           latency_ms=1e3 * (time.perf_counter() - started))
        return MatchedEstimate(estimate, found.matches)

    def camera_of(self, frame: Frame) -> Camera:
        """The camera of a frame, or the one that stands in for it.

        Raises InputError when there is neither.
        """
        camera = self.camera
        if frame.camera is not None:
            # The map knows the lens of its own camera better.
            camera = frame.camera if camera is None else frame.camera.with_distortion_of(camera)
        if camera is None:
            raise InputError(f'{frame.source or "image"}: expected a camera to localise with, '
                             'found none; give --fx --fy --cx --cy or --fov')
        return camera

    def localize_features(self, features: Features, camera: Camera,
                          T_map_cam_hint: np.ndarray | None = None) -> MatchedEstimate:
        """``localize_matched`` of an encoded image (stamp, source and latency are left empty)."""
        if len(features) < self.config.min_inliers:
            return _refused(_refusal('TOO_FEW_FEATURES'))
        similar, slots, network, poses = self._candidates(features, camera)
        poses += [] if T_map_cam_hint is None else [T_map_cam_hint]
        poses = self._distinct(poses, camera)
        if not poses:
            return _refused(_refusal('NO_CONSISTENT_POSE'))
        known = slots if len(self._values) else network
        fits = [(pose, self._refined(pose, features, known, camera)) for pose in poses]
        start, (final, matches) = max(fits, key=lambda fit: fit[1][0].count)
        if self.shift_px(start, final.T_map_cam, camera) > CONVERGED_PX:
            final, matches = self._refined(final.T_map_cam, features, known, camera)
        matches = matches.select(np.flatnonzero(final.inliers))
        estimate = self._judged(final, known, camera)
        if self.config.refuse_lookalikes and estimate.T_map_cam is not None \
                and (T_map_cam_hint is None
                     or not self.same_place(T_map_cam_hint, final.T_map_cam, camera)):
            horizon = self._horizon(final.T_map_cam, known, camera)
            answer = Answer(final.T_map_cam, estimate.score, horizon, matches.feature,
                            matches.pixels, similar)
            if len(self._values) and not holds(answer, features, self.memory, camera,
                                               ELSEWHERE * self.config.search_px,
                                               self.config.seed):
                estimate = replace(estimate, status=Status.NOT_LOCALISED, T_map_cam=None,
                                   covariance=None, reason='AMBIGUOUS')
        if estimate.reason == 'AMBIGUOUS':
            return self._told_apart(features, network, camera) or _refused(estimate)
        if estimate.T_map_cam is None:
            return _refused(estimate)
        return MatchedEstimate(estimate, matches)

    def _candidates(self, features: Features, camera: Camera
                    ) -> tuple[Similarities, Matches, Matches, list[np.ndarray]]:
        """What is like the features, of slots and of the network, and the poses that it gives.

        The confirmed slots first, then all, then all features and the network, until enough
        agree.
        """
        first: list[PoseFit] = []
        for search in self._searches:
            similar = search.compare(features.descriptors[:self.config.slot_queries])
            slots = self._from_slots(features, similar)
            first += self._first_poses(slots, camera)
            if any(fit.count > self.config.sure_share * len(slots) for fit in first):
                return similar, slots, _no_matches(), [fit.T_map_cam for fit in first]
        if len(features) > self.config.slot_queries:
            first += self._first_poses(self._from_slots(
                features, self._searches[-1].compare(features.descriptors)), camera)
        network = self._from_network(features)
        first += self._first_poses(network, camera)
        return similar, slots, network, [fit.T_map_cam for fit in first]

    def _distinct(self, poses: list[np.ndarray], camera: Camera) -> list[np.ndarray]:
        """The poses without those that are refined to the same as one before them."""
        distinct: list[np.ndarray] = []
        for pose in poses:
            if all(self.shift_px(other, pose, camera) > CONVERGED_PX for other in distinct):
                distinct.append(pose)
        return distinct

    def _told_apart(self, features: Features, network: Matches, camera: Camera
                    ) -> MatchedEstimate | None:
        """The pose that the network is sure of, where slots find the same things in many places.

        network: its answers, if it was asked already.
        It is silent about what the map has more than once. So its answers rarely meet on a pose
        where the camera was not; where most of them do, they know this place from its likes.
        """
        if not len(self._values):
            return None
        network = network if len(network) else self._from_network(features)
        fits = self._first_poses(network, camera) if len(network) >= MIN_JUDGES else []
        if not fits or fits[0].count < JUDGE_SHARE * len(network):
            return None
        start = fits[0].T_map_cam
        fit, matches = self._refined(start, features, network, camera)
        estimate = self._judged(fit, network, camera)
        if estimate.T_map_cam is None or not self.same_place(start, fit.T_map_cam, camera):
            return None
        return MatchedEstimate(estimate, matches.select(np.flatnonzero(fit.inliers)))

    def _from_network(self, features: Features) -> Matches:
        """The answers of the coordinate network with the most votes."""
        if not self.config.network_candidates:
            return _no_matches()
        points, votes = self.memory.network.read(features.descriptors)
        best = np.argsort(-votes, kind='stable')[:self.config.network_candidates]
        best = best[votes[best] > MIN_VOTES]
        return Matches(points[best], features.keypoints[best], best,
                       np.maximum(NETWORK_PX / np.sqrt(votes[best]), MIN_NETWORK_PX))

    def _from_slots(self, features: Features, similar: Similarities) -> Matches:
        """Mutual nearest neighbours between the most confident features and all slots."""
        if not len(self._values):
            return _no_matches()
        slot = similar.nearest()
        queries = features.descriptors[:len(slot)]
        cosines = queries @ self._values[slot].T  # [count, count]
        similarity = cosines.diagonal()
        chosen = np.flatnonzero((similarity >= cosines.max(0))
                                & (similarity > self.config.min_similarity))
        return Matches(self.memory.points[slot[chosen]], features.keypoints[chosen],
                       chosen, _slot_sigma_px(similarity[chosen]))

    def _first_poses(self, matches: Matches, camera: Camera) -> list[PoseFit]:
        """The pose of P3P in RANSAC on the matches of slots, or of the network; none if few agree.

        Both are searched apart: where the map ends the network extrapolates, and its wrong
        answers would outvote the few right slots.
        """
        config = self.config
        fit = pnp_ransac(matches.points, matches.pixels, camera, config.search_px, config.seed,
                         config.search_iterations)
        return [] if fit is None or fit.count < config.min_votes else [fit]

    def _refined(self, T_map_cam: np.ndarray, features: Features, known: Matches,
                 camera: Camera) -> tuple[PoseFit, Matches]:
        """Refine a pose on slots matched again around it; on the network if there are none.

        known: candidates that were found without a pose.
        """
        matches = known if not len(self._values) else self._rematch(
            features, camera, T_map_cam, self._horizon(T_map_cam, known, camera))
        return refine_pose(T_map_cam, matches.points, matches.pixels, camera,
                           sigma_px=matches.sigma_px, outlier_px=OUTLIER_SIGMAS), matches

    def _horizon(self, T_map_cam: np.ndarray, known: Matches, camera: Camera) -> float:
        """How far away something may be that a camera sees, by the candidates that agree."""
        agree = known.agreeing(T_map_cam, camera, self.config.search_px)
        if not agree.any():
            return np.inf
        depths = transform_points(inverse(T_map_cam), known.points[agree])[:, 2]
        return HORIZON * float(np.percentile(depths, FARTHEST_PERCENT))

    def _rematch(self, features: Features, camera: Camera, T_map_cam: np.ndarray,
                 horizon: float) -> Matches:
        """Slots seen from a pose and features near them that choose each other.

        The radius is wide on purpose: matches confined to a few pixels would confirm whatever
        pose they were predicted from. horizon: depth beyond which slots are of other rooms; a
        few of them that fit by chance turn a pose by their distance.
        """
        visible, pixels = in_view(T_map_cam, self.memory.points, camera, horizon)
        if not len(visible):
            return _no_matches()
        radius_px = self.config.rematch_radius * camera.width
        tree = cKDTree(features.keypoints)
        _, near = tree.query(pixels, NEIGHBOURS, distance_upper_bound=radius_px)
        row, column = np.nonzero(near < len(features))
        slot, feature = visible[row], near[row, column]
        similarity = paired_cosines(self._values, slot, features.descriptors, feature)
        similar = similarity > self.config.rematch_similarity
        slot, feature, similarity = slot[similar], feature[similar], similarity[similar]
        best_of_feature, best_of_slot = np.zeros(len(features)), np.zeros(len(self._values))
        np.maximum.at(best_of_feature, feature, similarity)
        np.maximum.at(best_of_slot, slot, similarity)
        mutual = (similarity >= best_of_feature[feature]) & (similarity >= best_of_slot[slot])
        slot, feature = slot[mutual], feature[mutual]
        return Matches(self.memory.points[slot], features.keypoints[feature], feature,
                       _slot_sigma_px(similarity[mutual]))

    def shift_px(self, T_before: np.ndarray, T_after: np.ndarray, camera: Camera) -> float:
        """How far the slots in view moved in the image between two poses, as a median."""
        return camera.shift_px(T_before, T_after, self.memory.points[::SHIFT_STEP])

    def _judged(self, fit: PoseFit, candidates: Matches, camera: Camera) -> Estimate:
        """Accept the pose, or refuse it with a reason: inlier ratio, and that of a second pose.

        The score counts the *unguided* candidates that agree: guided matches lie near the
        pose by construction and would flatter it. Beside slots the network does not count, unless
        it tells places apart: it answers everywhere, and its errors are correlated.
        """
        config = self.config
        if not len(candidates):
            return Estimate(0, Status.NOT_LOCALISED, reason='TOO_FEW_INLIERS')
        score = float(candidates.agreeing(fit.T_map_cam, camera, config.search_px).mean())
        # Candidates a little off belong to the same place; only far ones are votes for another.
        near = candidates.agreeing(fit.T_map_cam, camera, ELSEWHERE * config.search_px)
        runner_up = self._runner_up(candidates.select(~near), camera) / len(candidates)
        estimate = Estimate(0, Status.NOT_LOCALISED, inliers=fit.count, score=score,
                            runner_up=runner_up)
        if fit.count < config.min_inliers or score < config.min_score:
            return replace(estimate, reason='TOO_FEW_INLIERS')
        if runner_up > config.max_runner_up * score:
            return replace(estimate, reason='AMBIGUOUS')
        return replace(estimate, status=Status.TRACKING, T_map_cam=fit.T_map_cam,
                       covariance=fit.covariance)

    def same_place(self, T_a: np.ndarray, T_b: np.ndarray, camera: Camera) -> bool:
        """Whether a camera sees about the same from two poses [4, 4]."""
        return self.shift_px(T_a, T_b, camera) < ELSEWHERE * self.config.search_px

    def _runner_up(self, rest: Matches, camera: Camera) -> int:
        """Votes for the best pose among the candidates that disagree with the answer."""
        config = self.config
        other = pnp_ransac(rest.points, rest.pixels, camera, config.search_px, config.seed,
                           config.search_iterations // 4)
        return 0 if other is None else other.count


def _stages(memory: SceneMemory) -> list[np.ndarray]:
    """Slots [N] that are searched first and, where those do not suffice, next.

    Slots seen more than once answer most images, with half of the work, once they are the most.
    """
    every = np.arange(len(memory.points))
    confirmed = np.flatnonzero(memory.slot_counts.numpy()[memory.occupied] > 1)
    return [confirmed, every] if len(every) / 2 < len(confirmed) < len(every) else [every]


def _slot_sigma_px(similarity: np.ndarray) -> np.ndarray:
    """Expected reprojection errors [M] of slot matches with these cosines [M], pixels."""
    return SLOT_PX + SLOT_PX_UNLIKE * (1.0 - similarity)


def _no_matches() -> Matches:
    return Matches(np.zeros((0, 3)), np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0))


def _refused(estimate: Estimate) -> MatchedEstimate:
    return MatchedEstimate(estimate, _no_matches())


def _refusal(reason: str) -> Estimate:
    return Estimate(0, Status.NOT_LOCALISED, reason=reason)
