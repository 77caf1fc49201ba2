"""The benchmark of growth measures what it says."""

import numpy as np
import pytest

from benchmarks.attention_scaling import exponent, in_own_process


def test_exponent_of_a_power_law():
    rows = [{'views': n, 'cpu_seconds': 3 * n**1.7} for n in (64, 128, 256)]
    assert exponent(rows) == pytest.approx(1.7)


def test_a_point_is_measured_in_its_own_process():
    small, large = (in_own_process('softmax', views) for views in (2, 4))
    assert small['views'] == 2 and small['cpu_seconds'] > 0
    assert large['state_mb'] == pytest.approx(2 * small['state_mb'])
    assert np.isfinite(list(large.values())).all()
