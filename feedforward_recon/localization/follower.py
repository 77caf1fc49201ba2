"""``Follower``: a stream of images in a frozen memory, followed between answers of the localizer.

    image -> points of the last answer by optical flow (KLT) -> PnP -> pose
          -> the memory is queried when that fails, and every few images to check and renew

Querying the memory takes ten times as long as following. Only points of the memory
are followed, so drift lasts at most from one answer to the next, and nothing is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.pnp import PoseFit, pnp_ransac, refine_pose
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.localization.localizer import (
    OUTLIER_SIGMAS,
    Localizer,
    MatchedEstimate,
    Matches,
)
from feedforward_recon.mapping.matching import Tracks, follow, spread
from feedforward_recon.mapping.preparation import check_rgb
from feedforward_recon.mapping.tracking import MIN_AGREEMENT, Motion
from feedforward_recon.types import Estimate, Features, Frame, Status

# All four chosen by hand.
# Share of the points expected in view that must agree: a few of them do so by chance.
MIN_SURVIVING = 0.2
# Share of the points of the last answer below which the memory is queried before it is due.
RENEW_SHARE = 0.5
# Answers in a row that contradict what is followed: one may be wrong, so many are not.
MAX_CONTRADICTIONS = 5
# Times followed_images until an image waits for the memory, on a machine that is never idle.
OVERDUE = 3


@dataclass(frozen=True)
class Followed:
    """Points of the map in the newest image: ``tracks.ids`` are rows of points and sigma_px."""

    tracks: Tracks
    points: np.ndarray
    sigma_px: np.ndarray
    T_map_cam: np.ndarray


@dataclass(frozen=True)
class MemoryQuery:
    """A query to the memory: an image, and where it was followed to."""

    features: Features
    camera: Camera
    state: Followed


@dataclass
class Following:
    """State of following a stream.

    followed: points in the newest image, None before the first answer. unverified: the newest
    image, when the memory is due. runner_up, count: of the last answer adopted, the share of
    votes for another pose and the number of points. since: images since then.
    contradictions: answers in a row that disagreed with ``followed``.
    """

    followed: Followed | None = None
    motion: Motion = field(default_factory=Motion)
    unverified: Frame | None = None
    query: MemoryQuery | None = None
    runner_up: float = 0.0
    count: int = 0
    since: int = 0
    contradictions: int = 0

    def adopt(self, followed: Followed, answer: Estimate) -> None:
        """Go on from an answer of the memory and the points that agree with it."""
        self.followed, self.runner_up = followed, answer.runner_up
        self.count, self.since = len(followed.tracks.ids), 0


class Follower:
    """Poses of a stream of images. The localizer is only read; what is followed lives here."""

    def __init__(self, localizer: Localizer, config: TrackingConfig) -> None:
        self.localizer, self.config = localizer, config
        self._now = Following()

    def forget(self) -> None:
        """The next image continues nothing: the memory is queried."""
        self._now = Following()

    def process(self, frame: Frame, T_map_cam_hint: np.ndarray | None = None) -> Estimate:
        """Pose of the next image, or NOT_LOCALISED with the reason.

        T_map_cam_hint: tried first where the memory has to be queried.
        Raises InputError for an image that cannot be used.
        """
        started = time.perf_counter()
        check_rgb(frame)
        camera = self.localizer.camera_of(frame)
        gray = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
        fit = self._follow(frame.stamp_ns, gray, camera)
        if fit is None:
            self.forget()
            found = self.localizer.localize_matched(frame, T_map_cam_hint)
            if found.estimate.T_map_cam is not None:
                self._now.adopt(self._from_answer(found, gray, camera), found.estimate)
            self._now.motion.moved(frame.stamp_ns, None, np.eye(4))
            return found.estimate
        self._now.since += 1
        estimate = self._estimate(frame, fit, 1e3 * (time.perf_counter() - started))
        self._plan(frame, estimate)
        return estimate

    def work(self) -> bool:
        """A piece of querying the memory, if that is due; False when nothing is left.

        Other images may be processed between pieces: no piece takes long.
        """
        now = self._now
        if now.query is not None:
            query, now.query = now.query, None
            self._renew(query)
            return True
        frame, now.unverified = now.unverified, None
        if frame is None or now.followed is None:
            return False
        features = self.localizer.encoder.encode(frame.image)
        now.query = MemoryQuery(features, self.localizer.camera_of(frame), now.followed)
        return True

    def _renew(self, query: MemoryQuery) -> None:
        state, camera = query.state, query.camera
        found = self.localizer.localize_features(query.features, camera, state.T_map_cam)
        if self._agrees(found.estimate, state, camera):
            self._now.contradictions = 0
            renewed = self._up_to_date(self._from_answer(found, state.tracks.gray, camera), camera)
            if renewed is not None:
                self._now.adopt(renewed, found.estimate)
            return
        self._now.contradictions += 1
        if self._now.contradictions >= MAX_CONTRADICTIONS:
            self.forget()  # the next image is localised as if it were the first

    def _up_to_date(self, state: Followed, camera: Camera) -> Followed | None:
        """The points of an answer, followed into the newest image; None if too few are there."""
        newest = self._now.followed
        assert newest is not None
        if newest.tracks.gray is state.tracks.gray:
            return state
        found = self._into(state, newest.tracks.gray, newest.T_map_cam, camera)
        return None if found is None else found[0]

    # -- following -------------------------------------------------------------------------

    def _follow(self, stamp_ns: int, gray: np.ndarray, camera: Camera) -> PoseFit | None:
        """Follow the points into an image and take its pose; None if too few agree."""
        state = self._now.followed
        if state is None or state.tracks.gray.shape != gray.shape \
                or not self.localizer.config.followed_images:
            return None
        T_guess = self._now.motion.predict(state.T_map_cam, stamp_ns)
        found = self._into(state, gray, T_guess, camera)
        if found is None:
            return None
        self._now.followed, fit = found
        self._now.motion.moved(stamp_ns, state.T_map_cam, fit.T_map_cam)
        return fit

    def _into(self, state: Followed, gray: np.ndarray, T_guess: np.ndarray, camera: Camera
              ) -> tuple[Followed, PoseFit] | None:
        """The points of a state in another image, and its pose; None if too few agree."""
        guess_px = self._guess_px(state, T_guess, camera)
        tracks = follow(state.tracks, gray, guess_px, self.config)
        inside = np.all((guess_px > 0) & (guess_px < np.array(camera.size_wh)), axis=1)
        enough = max(self.config.min_inliers, MIN_AGREEMENT * len(tracks.ids),
                     MIN_SURVIVING * inside.sum())
        fit = self._pose(state, tracks, T_guess, camera, enough)
        if fit is None:
            return None
        tracks = tracks.select(np.flatnonzero(fit.inliers))
        return replace(state, tracks=tracks, T_map_cam=fit.T_map_cam), fit

    @staticmethod
    def _guess_px(state: Followed, T_guess: np.ndarray, camera: Camera) -> np.ndarray:
        """Where the points should be: moved in the image as the predicted camera says."""
        points = state.points[state.tracks.ids]
        before, after = (camera.project(transform_points(inverse(T), points))
                         for T in (state.T_map_cam, T_guess))
        moved = after - before
        return state.tracks.px + np.where(np.isfinite(moved), moved, 0.0)

    def _pose(self, state: Followed, tracks: Tracks, T_guess: np.ndarray, camera: Camera,
              enough: float) -> PoseFit | None:
        if len(tracks.ids) < enough:
            return None
        points, sigma_px = state.points[tracks.ids], state.sigma_px[tracks.ids]

        def polished(T_map_cam: np.ndarray) -> PoseFit:
            return refine_pose(T_map_cam, points, tracks.px, camera, sigma_px=sigma_px,
                               outlier_px=OUTLIER_SIGMAS)

        fit = polished(T_guess)
        if fit.count >= enough:
            return fit
        rough = pnp_ransac(points, tracks.px, camera, self.config.outlier_px, self.config.seed)
        fit = fit if rough is None else polished(rough.T_map_cam)
        return fit if fit.count >= enough else None

    def _estimate(self, frame: Frame, fit: PoseFit, latency_ms: float) -> Estimate:
        score = fit.count / len(fit.inliers)
        sure = fit.count >= 2 * self.config.min_inliers and score > 0.5 \
            and not self._now.contradictions
        return Estimate(frame.stamp_ns, Status.TRACKING if sure else Status.UNCERTAIN,
                        fit.T_map_cam, fit.covariance, fit.count, score,
                        self._now.runner_up, latency_ms=latency_ms, source=frame.source)

    # -- the memory ------------------------------------------------------------------------

    def _plan(self, frame: Frame, estimate: Estimate) -> None:
        """Decide whether the memory is to be queried about this image."""
        planned, now = self.localizer.config.followed_images, self._now
        few = estimate.inliers < RENEW_SHARE * now.count
        due = now.since >= planned or few or estimate.status is Status.UNCERTAIN
        now.unverified = frame if due and now.query is None else None
        if now.since >= OVERDUE * planned:
            while self.work():
                pass

    def _agrees(self, answer: Estimate, state: Followed, camera: Camera) -> bool:
        """Whether the memory has the camera about where it was followed to."""
        if answer.T_map_cam is None:
            return False
        return self.localizer.same_place(state.T_map_cam, answer.T_map_cam, camera)

    def _from_answer(self, found: MatchedEstimate, gray: np.ndarray, camera: Camera) -> Followed:
        """The points of an accepted answer, in its image."""
        chosen, T_map_cam = self._chosen(found.matches, camera), found.estimate.T_map_cam
        assert T_map_cam is not None
        tracks = Tracks(gray, np.arange(len(chosen)), chosen.pixels.astype(np.float32))
        return Followed(tracks, chosen.points, chosen.sigma_px, T_map_cam)

    def _chosen(self, matches: Matches, camera: Camera) -> Matches:
        """The most certain matches of each part of the image, as many as can be followed."""
        return matches.select(spread(matches.pixels, -matches.sigma_px, np.zeros((0, 2)),
                                     camera.size_wh, self.config.max_tracks))
