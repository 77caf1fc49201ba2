"""All images of a collection in one pass; what pairs of them show is looked up in its answer.

Time is linear in the number of images where the global attention keeps a state of fixed size
(``ttt``): unlike asking about pairs, where every pair is a pass of its own, all images are seen
once, and all together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from feedforward_recon.model.collection import (
    Collection,
    ImageWindows,
    Intrinsics,
    PairNetwork,
)
from feedforward_recon.model.configs import Network
from feedforward_recon.model.joint_pass import ViewInputs, joint_cells
from feedforward_recon.model.joint_plan import JointPlan, chunk_of, fixed_size, joint_plan
from feedforward_recon.model.predictor import Answer, NetworkPredictor
from feedforward_recon.model.preprocess import PreparedImage, padded_to_common_size, stacked
from feedforward_recon.model.ray_cameras import GeometryWork, geometry_of, pixel_maps
from feedforward_recon.model.ray_transformer import CellMaps, RayTransformer
from feedforward_recon.model.seconds import Seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JointAnswer:
    """What one pass says of N images.

    said: T_world_cam [N, 4, 4]; K [N, 3, 3] of the prepared images; depth and confidence
    [N, h, w] of pixels or, with ``of_cells``, of the cells of a ``RayTransformer``, the logarithm
    of depth.
    """

    said: Answer
    of_cells: bool

    def of(self, windows: ImageWindows, shown: object = None) -> Answer:
        """Of windows [B, n] of the images."""
        del shown
        chosen = torch.as_tensor(np.array(windows))
        T, K, depth, sure = (x[chosen] for x in self.said)
        if self.of_cells:
            depth, sure = pixel_maps(depth, sure)
        return T, K, depth, sure


# What the network says of all views; the seconds of its parts are added.
JointPass = Callable[[ViewInputs, Seconds], CellMaps | Answer]


class JointNetwork(PairNetwork):
    """Any network, which sees all images of a collection in one pass."""

    decodes: ClassVar[bool] = False

    def __init__(self, predictor: NetworkPredictor, pass_: JointPass | None = None,
                 processes: int = 1) -> None:
        """pass_: how the pass is made; default: by this process alone."""
        super().__init__(predictor)
        self._pass = pass_ or partial(pass_alone, predictor)
        self._processes = processes
        if not fixed_size(predictor.network):
            log.warning('%s attention compares all images with all: its time grows with the '
                        'square of their number; --attention ttt stays linear',
                        predictor.network.config.attention)

    def plan(self, images: int, size_hw: Sequence[int], kept: int = 0) -> JointPlan:
        """The plan of a pass; see ``joint_plan``."""
        return joint_plan(self.predictor.network, images, size_hw, self._processes, kept)

    def collected(self, images: Sequence[PreparedImage], K: Sequence[Intrinsics]) -> Collection:
        """All images of a collection, after the pass (see ``PairNetwork``).

        White is put around those that are smaller than others. Raises ConfigError, before the
        pass, where there is too little memory for so many.
        """
        placed = padded_to_common_size(list(images))
        self.plan(len(placed), placed[0].image.shape[:2]).check()
        own = np.stack([image.prepared_K(k) for image, k in zip(placed, K, strict=True)])
        with self.computing(f'one pass over {len(placed)} images', 'give fewer images'):
            answer = self._answer(ViewInputs(placed, own))
        return Collection(placed, answer.of)

    def told(self, collection: Collection, K: Sequence[Intrinsics]) -> Collection:
        """The same images; networks that are told intrinsics see them once more."""
        if isinstance(self.predictor.network, RayTransformer):
            return self.collected(collection.placed, K)
        return collection

    @torch.inference_mode()
    def _answer(self, views: ViewInputs) -> JointAnswer:
        with all_cores():
            said = self._pass(views, self.seconds)
        if not isinstance(said, CellMaps):
            T, K, depth, sure = said
            return JointAnswer((T[0], K[0], depth[0], sure[0]), of_cells=False)
        return answer_of_cells(self.predictor.network, said, views.K, self.seconds)


def answer_of_cells(network: Network, cells: CellMaps, K: np.ndarray, seconds: Seconds
                    ) -> JointAnswer:
    """Poses and bent depth of views with K [N, 3, 3], on all cores."""
    assert isinstance(network, RayTransformer)
    own = torch.from_numpy(K)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        T, log_depth = geometry_of(cells, own[None], network, first=True,
                                   work=GeometryWork(pool.map, seconds))
    return JointAnswer((T[0].float().cpu(), own.float(), log_depth[0].cpu(),
                        cells.depth_confidence[0].cpu()), of_cells=True)


def pass_alone(predictor: NetworkPredictor, views: ViewInputs, seconds: Seconds, chunk: int = 0
               ) -> CellMaps | Answer:
    """The pass by one process; chunk: views that are worked on at a time, 0: as many as fit."""
    network = predictor.network
    if isinstance(network, RayTransformer):
        with predictor.precision():
            chunk = chunk or chunk_of(network, views.size_hw, len(views.images))
            return joint_cells(network, views, chunk, seconds)
    with seconds.of('joint pass'):
        return predictor.together(stacked(views.images), torch.from_numpy(views.K)[None])


@contextmanager
def all_cores() -> Iterator[None]:
    """Within, torch computes on all cores, unless the user has decided (OMP_NUM_THREADS)."""
    before = torch.get_num_threads()
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
