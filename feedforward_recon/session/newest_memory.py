"""``NewestMemory``: localisation in the scene memory that is being written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from feedforward_recon.config.schema import LocalizerConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, Frame, Status

NO_MAP = 'NO_MAP'


class NewestMemory:
    """Finds images in a snapshot of what the writer holds, taken anew after each write.

    hint: says which T_map_cam [4, 4] is tried first for a lost camera, if any.
    """

    def __init__(self, writer: MemoryWriter, encoder: Encoder, config: LocalizerConfig,
                 hint: Callable[[], np.ndarray | None] = lambda: None) -> None:
        self._hint = hint
        self._writer, self._encoder, self._config = writer, encoder, config
        self._localizer: Localizer | None = None
        self._frozen_at = -1  # writes that the localizer knows of

    def configure(self, config: LocalizerConfig) -> None:
        """Localise with other settings from now on."""
        self._config, self._frozen_at = config, -1

    def localizer(self, camera: Camera | None) -> Localizer | None:
        """A localizer on the memory as it is; None while it is empty. camera: of the map."""
        writes = self._writer.slots.writes
        if self._writer.filled and self._frozen_at != writes:
            self._frozen_at = writes
            self._localizer = Localizer(self._writer.snapshot(), self._encoder, self._config,
                                        camera)
        return self._localizer

    def relocalise(self, view: View) -> Estimate:
        """Pose of a lost camera from the memory, or NOT_LOCALISED with the reason."""
        localizer = self.localizer(view.camera)
        frame = Frame(view.stamp_ns, view.image, camera=view.camera, source=view.source)
        return no_map(frame) if localizer is None else localizer.localize(frame, self._hint())


def no_map(frame: Frame) -> Estimate:
    """The answer while there is nothing to localise in."""
    return Estimate(frame.stamp_ns, Status.NOT_LOCALISED, reason=NO_MAP, source=frame.source)
