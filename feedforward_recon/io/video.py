"""Video files through OpenCV."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import cv2
import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.io.source import SECOND_NS, Source, SourceOptions
from feedforward_recon.types import Frame

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

MILLISECOND_NS = 1_000_000


class VideoSource(Source):
    """Frames of a video, always decoded from its beginning, so that every run sees the same.

    Stamps are the container's where the first frames have different ones, else index / fps. The
    container's own rotation is applied, so that images are upright. ``len`` is what the container
    says; damaged files may end earlier (a warning tells).
    """

    def __init__(self, path: Path, options: SourceOptions) -> None:
        """Open the file once and decode two frames.

        Raises InputError when the file is no video or nothing can be decoded.
        """
        super().__init__(str(path), options)
        self._path = path
        with self._capture() as capture:
            self._count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            self._fps = float(capture.get(cv2.CAP_PROP_FPS))
            readable, _ = capture.read()
            if not readable:
                raise InputError(f'{path}: expected a video, found nothing that can be decoded; '
                                 'convert it, for example to mp4 (H.264)')
            first_ms = capture.get(cv2.CAP_PROP_POS_MSEC)
            more = capture.grab()
            self._stamped = not more or capture.get(cv2.CAP_PROP_POS_MSEC) > first_ms
        if not self._stamped and not (np.isfinite(self._fps) and self._fps > 0):
            raise InputError(f'{path}: expected time stamps or a frame rate, found neither; '
                             'convert it, for example to mp4 (H.264)')
        if self._count < 1:
            self._count = self._counted()

    @property
    def total(self) -> int:
        """Frames as the container says."""
        return self._count

    @contextmanager
    def _capture(self) -> Iterator[cv2.VideoCapture]:
        capture = cv2.VideoCapture(str(self._path))
        try:
            if not capture.isOpened():
                raise InputError(f'{self._path}: expected a video, found a file that OpenCV '
                                 'cannot open; convert it, for example to mp4 (H.264)')
            yield capture
        finally:
            capture.release()

    def _counted(self) -> int:
        """Frames counted by stepping through the file: the container does not say."""
        with self._capture() as capture:
            count = 0
            while capture.grab():
                count += 1
        return count

    def _read(self, indices: range) -> Iterator[Frame]:
        wanted = iter(indices)
        target = next(wanted, None)
        with self._capture() as capture:
            index = 0
            while target is not None and capture.grab():
                if index == target:
                    readable, image = capture.retrieve()
                    if not readable:
                        break
                    yield self._frame(capture, index, image)
                    target = next(wanted, None)
                index += 1
        if target is not None:
            logger.warning('%s: expected %d frames, found %d; the file may be damaged',
                           self._path, self._count, index)

    def _frame(self, capture: cv2.VideoCapture, index: int, image: np.ndarray) -> Frame:
        if self._stamped:
            stamp_ns = round(capture.get(cv2.CAP_PROP_POS_MSEC) * MILLISECOND_NS)
        else:
            stamp_ns = round(index * SECOND_NS / self._fps)
        rgb = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)
        camera = self.options.camera_for((rgb.shape[1], rgb.shape[0]))
        return Frame(stamp_ns, rgb, camera=camera, source=f'{self._path.name}#{index}')
