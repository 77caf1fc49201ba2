"""The length of a map's unit: known to the session, or measured against odometry."""

from __future__ import annotations

from collections.abc import Callable

from feedforward_recon.ros.arrivals import Arrival
from feedforward_recon.ros.frames import Frames, OdometryScale
from feedforward_recon.ros.host import Host
from feedforward_recon.session.live import SessionInfo
from feedforward_recon.types import Estimate


class MapScale:
    """Metres per unit of the map, for the poses that are published.

    on_found: called with the scale [m per unit] and its relative uncertainty once odometry gives
    one. metres_per_unit: of the newest pose, None while it is unknown.
    """

    def __init__(self, host: Host, frames: Frames, on_found: Callable[[float, float], None]
                 ) -> None:
        self._host, self._frames, self._on_found = host, frames, on_found
        self.metres_per_unit: float | None = None
        self._odometry = OdometryScale()

    def new_map(self) -> None:
        """Another map: its unit is not known yet."""
        self.metres_per_unit = None
        self._odometry = OdometryScale()

    def known(self, info: SessionInfo) -> float | None:
        """Metres per unit as they are known now."""
        self.metres_per_unit = info.metres_per_unit or self._odometry.metres_per_unit
        return self.metres_per_unit

    def measured(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> float | None:
        """The same, where a pose without a scale is first compared with odometry.

        Raises TransformError while TF does not know odometry at the stamp.
        """
        if not info.metres_per_unit:
            self._compare(arrival, estimate)
        return self.known(info)

    def _compare(self, arrival: Arrival, estimate: Estimate) -> None:
        frames, scale = self._frames, self._odometry
        if estimate.T_map_cam is None or not frames.knows_odometry(arrival.frame_id):
            return
        T_odom_cam = frames.buffer.lookup(frames.config.odom_frame, arrival.frame_id,
                                          arrival.stamp_ns)
        if scale.add(estimate.T_map_cam[:3, 3], T_odom_cam[:3, 3]) \
                and scale.metres_per_unit is not None:
            self._on_found(scale.metres_per_unit, scale.uncertainty)

    def is_awaited(self, child_frame: str, camera_frame: str) -> bool:
        """Map -> odom mixes the map's unit with metres: it is not sent before the scale is known.

        child_frame: the frame that would be sent below the map.
        """
        config = self._frames.config
        awaited = self.metres_per_unit is None \
            and self._frames.is_driven(child_frame, camera_frame)
        if awaited:
            step = 'drive some decimetres' if child_frame == config.odom_frame \
                else f'set odom_frame to {child_frame}'
            self._host.notice('SCALE_UNKNOWN', f'no {config.map_frame} -> {child_frame} yet: the '
                              f'scale of a monocular map comes from odometry; {step}')
        return awaited
