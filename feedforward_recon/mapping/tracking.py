"""Tracking: landmarks followed by optical flow (KLT) from the last frame, and PnP on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.geometry.bearings import Bearings
from feedforward_recon.geometry.pnp import FLOOR_STD, PoseFit, pnp_ransac, refine_pose
from feedforward_recon.geometry.transforms import inverse, se3_exp, se3_log, transform_points
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks, follow
from feedforward_recon.types import Features

# Share of the followed landmarks that must agree with a pose; with fewer, much of the view moves
# by itself or optical flow slipped; chosen by hand.
MIN_AGREEMENT = 0.4
# Share of landmarks, and of votes, above which no other pose is looked for: what moves is small
# then; chosen by hand.
UNDISPUTED = 0.8
# Share of the winner's votes above which a pose is not sure; chosen by hand.
CLEAR_WIN = 0.5
# Keyframes that confirm a landmark: two give the point, another one that it stays where it is.
CONFIRMED = 3
# Times min_inliers: with so many confirmed landmarks the others are not needed for a pose; chosen
# by hand.
ENOUGH = 2
# Of Gauss-Newton for a pose, and for a first one that only tells which tracks agree; it converges
# in about four from a prediction.
STEPS, FIRST_STEPS = 10, 3
# Tracks without a point, as a share of those that agree on a pose, from which they hold it too:
# with fewer nothing was gained (docs/experiments.md, When lengths are right).
BEARINGS = 0.25
MAX_EXTRAPOLATION = 3.0  # intervals between images: velocity does not last longer


@dataclass(frozen=True)
class Tracked:
    """A tracked frame: what it sees and from where; features if they were computed on the way.

    relocalised: the camera was lost before. extends: False for a frame that must leave the map
    as it is. sure, score: what the pose source itself thinks of the pose; None leaves it to the
    mapper.
    """

    tracks: Tracks
    fit: PoseFit
    features: Features | None = None
    relocalised: bool = False
    extends: bool = True
    sure: bool | None = None
    score: float | None = None


class Motion:
    """Constant velocity of a camera from one image to the next."""

    def __init__(self) -> None:
        self._stamp_ns = 0
        self._interval_ns = 0
        self._velocity = np.zeros(6)  # camera-frame tangent per nanosecond

    def moved(self, stamp_ns: int, T_before: np.ndarray | None, T_map_cam: np.ndarray) -> None:
        """Take the pose at a stamp; T_before: the pose at the stamp before, None if unknown."""
        interval = stamp_ns - self._stamp_ns
        self._velocity = np.zeros(6)
        if T_before is not None and interval > 0:
            self._velocity = se3_log(inverse(T_before) @ T_map_cam) / interval
            self._interval_ns = interval
        self._stamp_ns = stamp_ns

    def predict(self, T_map_cam: np.ndarray, stamp_ns: int) -> np.ndarray:
        """Pose at a stamp after the last one, ``T_map_cam``; across a long pause it stays."""
        interval = stamp_ns - self._stamp_ns
        if not 0 < interval <= MAX_EXTRAPOLATION * max(self._interval_ns, 1):
            return T_map_cam
        return T_map_cam @ se3_exp(self._velocity * interval)


class Tracker:
    """Motion state of the camera and the tracks of the last frame that was tracked."""

    def __init__(self, config: TrackingConfig) -> None:
        self.config = config
        self.tracks: Tracks | None = None
        self.T_map_cam = np.eye(4)
        self._motion = Motion()

    def accept(self, view: View, tracks: Tracks, T_map_cam: np.ndarray,
               *, moved: bool = True) -> None:
        """Take a frame's pose and tracks as the state from which the next is predicted.

        moved: the motion since the last accepted frame is known (not after a loss).
        """
        known = moved and self.tracks is not None
        self._motion.moved(view.stamp_ns, self.T_map_cam if known else None, T_map_cam)
        self.tracks, self.T_map_cam = tracks, T_map_cam

    def corrected(self, tracks: Tracks, T_map_cam: np.ndarray) -> None:
        """The last frame has another pose, and tracks with other ids or more of them."""
        self.tracks, self.T_map_cam = tracks, T_map_cam

    def map_moved(self, map_: GrowingMap, T_new_old: np.ndarray) -> None:
        """The map around the camera moved by T_new_old [4, 4]; some landmarks have other ids."""
        assert self.tracks is not None
        self.tracks = map_.current(self.tracks)
        self.T_map_cam = T_new_old @ self.T_map_cam

    def predict(self, stamp_ns: int) -> np.ndarray:
        """Pose at a stamp by constant velocity; across a long pause the camera stays."""
        return self._motion.predict(self.T_map_cam, stamp_ns)

    def given(self, view: View, map_: GrowingMap, T_map_cam: np.ndarray) -> Tracked:
        """Tracks of a frame whose pose is known; those that disagree with it are dropped."""
        tracks = self.flow(view, map_, T_map_cam)
        known = map_.landmarks.has_point[tracks.ids]
        points = map_.landmarks.points_map(tracks.ids, map_.T_map_cam)
        px = view.camera.project(transform_points(inverse(T_map_cam), points))
        near = np.linalg.norm(px - tracks.px, axis=1) < self.config.outlier_px
        tracks = tracks.select(near | ~known)
        return Tracked(tracks, exact_fit(T_map_cam, len(tracks.ids)))

    def flow(self, view: View, map_: GrowingMap, T_guess: np.ndarray) -> Tracks:
        """The last tracks followed into a frame whose pose is about ``T_guess``."""
        assert self.tracks is not None
        tracks = self.tracks.select(map_.landmarks.alive[self.tracks.ids])
        return follow(tracks, view.gray, self._guess_px(view, map_, tracks, T_guess),
                      self.config)

    def _guess_px(self, view: View, map_: GrowingMap, tracks: Tracks,
                  T_guess: np.ndarray) -> np.ndarray:
        """Predicted pixels: landmarks projected, others moved as if at the median depth."""
        table = map_.landmarks
        points = transform_points(inverse(self.T_map_cam),
                                  table.points_map(tracks.ids, map_.T_map_cam))
        known = np.isfinite(points[:, 2]) & (points[:, 2] > 0)
        if not known.any():
            return tracks.px
        depth = np.where(known, points[:, 2], np.median(points[known, 2]))
        start = view.camera.unproject(tracks.px, depth)
        px = view.camera.project(transform_points(inverse(T_guess) @ self.T_map_cam, start))
        return np.where(np.isfinite(px), px, tracks.px)

    def track(self, view: View, map_: GrowingMap, least: int = 0) -> Tracked | None:
        """Follow the tracks into a frame and find its pose; None if too few agree.

        least: landmarks that must agree, where that is more than ``min_inliers``.

        First from the prediction by constant velocity; if that fails by PnP in RANSAC.
        """
        if self.tracks is None:
            return None
        T_guess = self.predict(view.stamp_ns)
        tracks = self.flow(view, map_, T_guess)
        known = map_.landmarks.has_point[tracks.ids]
        voters = tracks.select(known)
        views = map_.landmarks.views()[voters.ids]
        fit = self._pose(view, map_, voters, views, T_guess)
        if fit is None or fit.count < least:
            return None
        if not view.has_depth:  # a sensor gives nearly every landmark its point at once
            fit = self._steadied(view, map_, voters, tracks.select(~known), fit)
        election = elected(view, map_, voters, views - 1, fit, self.config)
        fit = election.winner
        if election.is_clear:  # what moves would be a landmark at every place where it was seen
            map_.landmarks.alive[voters.ids[election.others]] = False
        keep = ~known
        keep[known] = fit.inliers
        return Tracked(tracks.select(keep), fit, sure=None if election.is_clear else False)

    def _pose(self, view: View, map_: GrowingMap, tracks: Tracks, views: np.ndarray,
              T_guess: np.ndarray) -> PoseFit | None:
        """First from the confirmed tracks if these are enough, then from all that agree.

        views: keyframes that saw each [n]. None if too few agree. Landmarks that moved would pull
        the pose with them: within ``outlier_px`` much can be explained by turning a little.
        """
        config = self.config
        confirmed = views >= CONFIRMED
        if confirmed.all() or confirmed.sum() < ENOUGH * config.min_inliers:
            return self._agreed(view, map_, tracks, T_guess)
        first = self._agreed(view, map_, tracks.select(confirmed), T_guess, FIRST_STEPS)
        if first is None:
            return None
        agreeing = followed(first, view, map_, tracks, config).inliers
        fit = fit_pose(view, map_, tracks.select(agreeing), first.T_map_cam, config)
        agreeing[agreeing] = fit.inliers
        return replace(fit, inliers=agreeing)

    def _agreed(self, view: View, map_: GrowingMap, tracks: Tracks, T_guess: np.ndarray,
                steps: int = STEPS) -> PoseFit | None:
        enough = max(self.config.min_inliers, MIN_AGREEMENT * len(tracks.ids))
        if len(tracks.ids) < self.config.min_inliers:
            return None
        fit = fit_pose(view, map_, tracks, T_guess, self.config, steps)
        if fit.count >= enough:
            return fit
        points = map_.landmarks.points_map(tracks.ids, map_.T_map_cam)
        rough = pnp_ransac(points, tracks.px, view.camera, self.config.outlier_px,
                           self.config.seed)
        if rough is None:
            return None
        fit = fit_pose(view, map_, tracks, rough.T_map_cam, self.config)
        return fit if fit.count >= enough else None

    def _steadied(self, view: View, map_: GrowingMap, tracks: Tracks, pending: Tracks,
                  fit: PoseFit) -> PoseFit:
        """A pose on which ``tracks`` agree, held by ``pending`` ones too, which have no point yet.

        Where the landmarks lie in one part of the image, small errors of their points explain a
        way sidewards by a turn; bearings in the rest of it do not let the camera turn.
        """
        if len(pending.ids) < BEARINGS * fit.count:
            return fit
        tracks = tracks.select(fit.inliers)
        steadied = fit_pose(view, map_, tracks, fit.T_map_cam, self.config,
                            bearings=_bearings(view, map_, pending, tracks, fit.T_map_cam))
        if steadied.count < max(self.config.min_inliers, MIN_AGREEMENT * len(fit.inliers)):
            return fit
        inliers = fit.inliers.copy()
        inliers[inliers] = steadied.inliers
        return replace(steadied, inliers=inliers)


def _bearings(view: View, map_: GrowingMap, pending: Tracks, known: Tracks,
              T_map_cam: np.ndarray) -> Bearings:
    """Tracks ``pending`` whose landmarks have no point yet, as far away as the ``known`` ones."""
    table = map_.landmarks
    points = transform_points(inverse(T_map_cam), table.points_map(known.ids, map_.T_map_cam))
    T, xy = table.first_seen(pending.ids, map_.T_map_cam)
    directions = np.einsum('ijm,jm->im', T[:3, :3], np.vstack([xy, np.ones(len(pending.ids))]))
    inv_depth = float(np.median(1 / points[:, 2]))
    return Bearings(T[:3, 3], directions, view.camera.normalise(pending.px).T, inv_depth)


def followed(fit: PoseFit, view: View, map_: GrowingMap, tracks: Tracks,
             config: TrackingConfig) -> PoseFit:
    """The same pose with all tracks that agree with it as inliers."""
    points = map_.landmarks.points_map(tracks.ids, map_.T_map_cam)
    px = view.camera.project(transform_points(inverse(fit.T_map_cam), points))
    return replace(fit, inliers=np.linalg.norm(px - tracks.px, axis=1) < config.outlier_px)


@dataclass(frozen=True)
class Election:
    """The pose that the tracked landmarks voted for.

    is_clear: no other pose came near. others: mask [n] of the tracks that agree with another one.
    """

    winner: PoseFit
    is_clear: bool
    others: np.ndarray


def elected(view: View, map_: GrowingMap, tracks: Tracks, votes: np.ndarray, fit: PoseFit,
            config: TrackingConfig) -> Election:
    """The pose ``fit`` or another one that landmarks agree on, if they are trusted more.

    votes: of each track [n], one for each keyframe that saw it after its first. Where much of the
    view moves by itself, two poses have followers: what stands still was confirmed, what moves is
    new again and again.
    """
    agreed = votes[fit.inliers].sum() >= UNDISPUTED * votes.sum()
    rival = None if agreed and support(fit) > UNDISPUTED \
        else _another(view, map_, tracks, ~fit.inliers, config)
    if rival is None:
        return Election(fit, True, np.zeros(len(tracks.ids), bool))
    own, others = (one.inliers & ~two.inliers for one, two in ((fit, rival), (rival, fit)))
    ours, theirs = int(votes[own].sum()), int(votes[others].sum())
    if theirs > ours:
        fit, others = rival, own
    return Election(fit, min(ours, theirs) < CLEAR_WIN * max(ours, theirs), others)


def _another(view: View, map_: GrowingMap, tracks: Tracks, rest: np.ndarray,
             config: TrackingConfig) -> PoseFit | None:
    """The pose on which enough of the tracks in the mask ``rest`` [n] agree; None without."""
    table = map_.landmarks
    points = table.points_map(tracks.ids, map_.T_map_cam)
    rough = pnp_ransac(points[rest], tracks.px[rest], view.camera, config.outlier_px, config.seed)
    if rough is None or rough.count < config.min_inliers:
        return None
    # From these alone: the others, which are more, would pull it back to where they are.
    fit = fit_pose(view, map_, tracks.select(np.flatnonzero(rest)[rough.inliers]),
                   rough.T_map_cam, config)
    return followed(fit, view, map_, tracks, config)


def exact_fit(T_map_cam: np.ndarray, inliers: int = 0) -> PoseFit:
    """A pose T_map_cam [4, 4] that was given or that defines the map frame."""
    return PoseFit(T_map_cam, np.diag(FLOOR_STD**2), np.ones(inliers, bool))


def support(fit: PoseFit) -> float:
    """Share of the tested matches that agree with a pose, 0..1 (1 without any)."""
    return fit.count / len(fit.inliers) if len(fit.inliers) else 1.0


def is_well_supported(fit: PoseFit, config: TrackingConfig) -> bool:
    """Whether twice ``min_inliers`` agree with a pose, and more than half of what was tested."""
    return fit.count >= 2 * config.min_inliers and support(fit) > 0.5


def fit_pose(view: View, map_: GrowingMap, tracks: Tracks, T_guess: np.ndarray,
             config: TrackingConfig, steps: int = STEPS, bearings: Bearings | None = None
             ) -> PoseFit:
    """Pose from tracks whose landmarks have points, and bearings, refined from a guess [4, 4]."""
    points = map_.landmarks.points_map(tracks.ids, map_.T_map_cam)
    depth = view.depth_at(tracks.px) if view.has_depth else None
    noise = view.inv_depth_noise or map_.depth_noise
    return refine_pose(T_guess, points, tracks.px, view.camera, depth=depth,
                       depth_noise=noise, outlier_px=config.outlier_px, iterations=steps,
                       bearings=bearings)
