"""The online mapper for frames whose poses a network has given."""

from __future__ import annotations

from feedforward_recon.config import MapperConfig
from feedforward_recon.mapping.online import OnlineReconstructor


class PosedMapper(OnlineReconstructor):
    """The online mapper for poses that come from a network and may move in the end."""

    def release(self, exact: MapperConfig) -> None:
        """Refine all keyframes with wide gates; from now on the settings are ``exact``.

        Errors of degrees are many pixels: gates that suit tracking would take the evidence for
        outliers.
        """
        self.poses = 'estimated'
        self._refine_all(refine_focal=False)
        self.config = self._map.config = exact
