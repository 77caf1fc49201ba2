"""A small tree of frames with a short memory, fed from /tf and /tf_static.

Why not tf2_ros: its Python buffer does not forget when time jumps back on Humble, starts a
thread and a second executor, and does not come as a wheel. What a camera node needs is small:
poses between frames at the stamp of an image, exact sentences when there are none.

Each frame has one parent. Between two samples of an edge the translation is linear and the
rotation turns at constant rate (slerp); outside them nothing is made up. When time jumps, samples
are forgotten, parents are not. Not thread-safe: the node's single-threaded executor
owns it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    matrix_from_quat_xyzw,
    so3_exp,
    so3_log,
)

SECOND_NS = 1_000_000_000
JUMP_NS = SECOND_NS
ROTATION_TOLERANCE = 1e-3


class TransformError(InputError):
    """The pose between two frames is not known; ``kind`` says why.

    missing: no chain of transforms joins the frames. future, past: the stamp lies outside the
    samples of an edge. loop: a transform would make a frame its own ancestor.
    """

    def __init__(self, sentence: str, kind: Literal['missing', 'future', 'past', 'loop']) -> None:
        super().__init__(sentence)
        self.kind = kind


@dataclass
class _Edge:
    """Samples of T_parent_child [4, 4], ordered by stamp; a static edge has one.

    on_tf: TF has this edge, not an odometry topic alone. last: the newest sample, also from before
    a jump of time, after which there may be none.
    """

    parent: str
    static: bool
    on_tf: bool
    last: np.ndarray = field(default_factory=lambda: np.eye(4))
    stamps_ns: list[int] = field(default_factory=list)
    transforms: list[np.ndarray] = field(default_factory=list)

    def add(self, stamp_ns: int, T_parent_child: np.ndarray, history_ns: int) -> None:
        """Keep a sample in its place, a second one of the same stamp instead of the first."""
        if self.static or (self.stamps_ns and stamp_ns < self.stamps_ns[-1] - JUMP_NS):
            self.forget()
        self.last = T_parent_child
        place = bisect_left(self.stamps_ns, stamp_ns)
        same = place < len(self.stamps_ns) and self.stamps_ns[place] == stamp_ns
        self.stamps_ns[place:place + same] = [stamp_ns]
        self.transforms[place:place + same] = [T_parent_child]
        old = bisect_left(self.stamps_ns, self.stamps_ns[-1] - history_ns)
        del self.stamps_ns[:old], self.transforms[:old]

    def forget(self) -> None:
        """Time jumped: the stamps of the samples mean nothing now."""
        self.stamps_ns, self.transforms = [], []

    def near(self, stamp_ns: int, child: str) -> np.ndarray:
        """T_parent_child at a stamp, outside the samples at the nearest of them."""
        if not self.stamps_ns:
            return self.last
        return self.at(min(max(stamp_ns, self.stamps_ns[0]), self.stamps_ns[-1]), child)

    def at(self, stamp_ns: int, child: str) -> np.ndarray:
        """T_parent_child at a stamp. Raises TransformError outside the samples."""
        if self.static:
            return self.transforms[0]
        if not self.stamps_ns:
            raise TransformError(
                f'expected the transform {self.parent!r} -> {child!r} at the stamp asked for, '
                'found none since the stamps jumped; wait for it or check its publisher',
                'future')
        if stamp_ns > self.stamps_ns[-1]:
            raise self._outside('future', stamp_ns - self.stamps_ns[-1], child)
        if stamp_ns < self.stamps_ns[0]:
            raise self._outside('past', self.stamps_ns[0] - stamp_ns, child)
        after = bisect_left(self.stamps_ns, stamp_ns)
        if self.stamps_ns[after] == stamp_ns:
            return self.transforms[after]
        start_ns, end_ns = self.stamps_ns[after - 1:after + 1]
        start, end = self.transforms[after - 1:after + 1]
        return _between(start, end, (stamp_ns - start_ns) / (end_ns - start_ns))

    def _outside(self, kind: Literal['future', 'past'], gap_ns: int, child: str
                 ) -> TransformError:
        edge = f'{self.parent!r} -> {child!r}'
        if kind == 'future':
            return TransformError(
                f'expected the transform {edge} at the stamp asked for, found its newest '
                f'{gap_ns / 1e6:.1f} ms earlier (extrapolation into the future); wait for it or '
                'check the clock of its publisher', kind)
        return TransformError(
            f'expected the transform {edge} at the stamp asked for, found its oldest '
            f'{gap_ns / 1e6:.1f} ms later (extrapolation into the past); the stamp is older than '
            'what is remembered', kind)


class TransformBuffer:
    """The tree of frames and the last ``history_s`` seconds of each moving edge.

    Names lose leading slashes, as in tf2. Stamps are nanoseconds, transforms float64 [4, 4].
    """

    def __init__(self, history_s: float = 10.0) -> None:
        self._history_ns = int(history_s * SECOND_NS)
        self._edges: dict[str, _Edge] = {}

    def set(self, parent: str, child: str, T_parent_child: np.ndarray, stamp_ns: int,
            static: bool = False, on_tf: bool = True) -> None:
        """Add a sample of an edge; a frame that gets another parent leaves the first.

        A stamp more than 1 s before the edge's newest means that time jumped: the edge forgets.
        on_tf: False for an edge from another topic, which never replaces one of TF.
        Raises InputError for empty names and what is no rigid transform, TransformError when
        the child is the parent or above it. The tree stays as it was then.
        """
        parent, child = _name(parent), _name(child)
        T_parent_child = np.array(T_parent_child, float)
        _check(parent, child, T_parent_child)
        if child in self.ancestry(parent):
            raise TransformError(
                f'expected a tree of frames, found {parent!r} -> {child!r} where {child!r} is '
                f'{"the parent itself" if child == parent else f"already above {parent!r}"}; '
                'stop one of the publishers', 'loop')
        edge = self._edges.get(child)
        if edge is not None and edge.on_tf and not on_tf:
            return
        if edge is None or (edge.parent, edge.static) != (parent, static):
            edge = self._edges[child] = _Edge(parent, static, on_tf)
        edge.on_tf = on_tf
        edge.add(stamp_ns, T_parent_child, self._history_ns)

    def take(self, transforms: Iterable[Any], static: bool = False) -> list[str]:
        """Add geometry_msgs/TransformStamped; returns a sentence for each refused one."""
        refused = []
        for stamped in transforms:
            header, move = stamped.header, stamped.transform
            q, t = move.rotation, move.translation
            try:
                T_parent_child = make_transform(matrix_from_quat_xyzw(np.array(
                    [q.x, q.y, q.z, q.w])), np.array([t.x, t.y, t.z]))
                self.set(header.frame_id, stamped.child_frame_id, T_parent_child,
                         header.stamp.sec * SECOND_NS + header.stamp.nanosec, static)
            except InputError as error:
                refused.append(f'TF {header.frame_id!r} -> {stamped.child_frame_id!r}: {error}')
        return refused

    def clear(self) -> None:
        """Forget all that moves; static transforms stay, since their publishers send them once."""
        self._edges = {child: edge for child, edge in self._edges.items() if edge.static}

    def jumped(self, stamp_ns: int) -> None:
        """Time jumped back to a stamp: forget samples, keep the parents.

        An edge whose newest sample is near the stamp has made the jump already.
        """
        for edge in self._edges.values():
            if not edge.static and edge.stamps_ns and edge.stamps_ns[-1] > stamp_ns + JUMP_NS:
                edge.forget()

    def parent_of(self, frame: str, on_tf: bool = False) -> str | None:
        """The frame above, or None at a root and for unknown frames.

        on_tf: edges of other topics do not count.
        """
        edge = self._edges.get(_name(frame))
        return None if edge is None or (on_tf and not edge.on_tf) else edge.parent

    def can(self, target: str, source: str) -> bool:
        """True when a chain of transforms joins the frames, whatever its stamps."""
        return self._common(_name(target), _name(source)) is not None

    def moves(self, target: str, source: str) -> bool:
        """True when an edge between the frames is not static.

        Raises TransformError where no chain joins them.
        """
        return any(not self._edges[child].static
                   for leg in self._legs(_name(target), _name(source)) for child in leg)

    def lookup(self, target: str, source: str, stamp_ns: int) -> np.ndarray:
        """T_target_source [4, 4] at a stamp.

        Raises TransformError, which names the missing or the late edge.
        """
        return self._joined(target, source, lambda edge, child: edge.at(stamp_ns, child))

    def lookup_near(self, target: str, source: str, stamp_ns: int) -> np.ndarray:
        """T_target_source [4, 4], of each edge what is known nearest to the stamp.

        Raises TransformError where no chain joins the frames.
        """
        return self._joined(target, source, lambda edge, child: edge.near(stamp_ns, child))

    def _joined(self, target: str, source: str, of_edge: Callable[[_Edge, str], np.ndarray]
                ) -> np.ndarray:
        """T_target_source [4, 4] over the frames' lowest common ancestor."""
        tops = []
        for leg in self._legs(_name(target), _name(source)):
            T_top_bottom = np.eye(4)
            for child in leg:
                T_top_bottom = of_edge(self._edges[child], child) @ T_top_bottom
            tops.append(T_top_bottom)
        return inverse(tops[0]) @ tops[1]

    def ancestry(self, frame: str) -> list[str]:
        """The frame, its parent, and so on to the root."""
        found = [_name(frame)]
        while (edge := self._edges.get(found[-1])) is not None:
            found.append(edge.parent)
        return found

    def _common(self, target: str, source: str) -> str | None:
        """The lowest frame above both, or None."""
        above = set(self.ancestry(target))
        return next((frame for frame in self.ancestry(source) if frame in above), None)

    def _legs(self, target: str, source: str) -> tuple[list[str], list[str]]:
        """The frames from each of the two up to below their common ancestor."""
        common = self._common(target, source)
        if common is None:
            raise self._missing(target, source)
        first, second = (self.ancestry(frame) for frame in (target, source))
        return first[:first.index(common)], second[:second.index(common)]

    def _missing(self, target: str, source: str) -> TransformError:
        known = self._edges.keys() | {edge.parent for edge in self._edges.values()}
        unheard = [frame for frame in (target, source) if frame not in known]
        roots = [self.ancestry(frame)[-1] for frame in (target, source)]
        found = f'no transform with {" or ".join(map(repr, unheard))} yet' if unheard \
            else f'two trees with the roots {roots[0]!r} and {roots[1]!r}'
        return TransformError(
            f'expected transforms that join {target!r} and {source!r}, found {found}; publish '
            f'one between {roots[0]!r} and {roots[1]!r}', 'missing')


def _name(frame: str) -> str:
    return frame.lstrip('/')


def _check(parent: str, child: str, T: np.ndarray) -> None:
    if not parent or not child:
        raise InputError(f'expected two names of frames, found {parent!r} and {child!r}; set the '
                         'frame_id of the publisher')
    rigid = T.shape == (4, 4) and bool(np.all(np.isfinite(T))) \
        and np.array_equal(T[3], [0, 0, 0, 1]) and np.linalg.det(T[:3, :3]) > 0 \
        and np.abs(T[:3, :3] @ T[:3, :3].T - np.eye(3)).max() < ROTATION_TOLERANCE
    if not rigid:
        raise InputError(f'expected a rigid transform {parent!r} -> {child!r}, found '
                         f'{np.array2string(T, precision=3)}; check its publisher')


def _between(T_start: np.ndarray, T_end: np.ndarray, share: float) -> np.ndarray:
    """The transform a share of 0..1 of the way: linear translation, constant rate of turn."""
    R_start = T_start[:3, :3]
    R = R_start @ so3_exp(share * so3_log(R_start.T @ T_end[:3, :3]))
    return make_transform(R, (1 - share) * T_start[:3, 3] + share * T_end[:3, 3])
