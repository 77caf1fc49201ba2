"""The benchmarks of growth measure what they say."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention_gpu
from benchmarks.attention_scaling import exponent, in_own_process
from benchmarks.ttt_update import layer_flops, update_row
from feedforward_recon.model.attention.ttt import TttAttention
from feedforward_recon.model.configs import build


def test_exponent_of_a_power_law():
    rows = [{'views': n, 'cpu_seconds': 3 * n**1.7} for n in (64, 128, 256)]
    assert exponent(rows) == pytest.approx(1.7)


def test_a_point_is_measured_in_its_own_process():
    small, large = (in_own_process('softmax', views) for views in (2, 4))
    assert small['views'] == 2 and small['cpu_seconds'] > 0
    assert large['state_mb'] == pytest.approx(2 * small['state_mb'])
    assert np.isfinite(list(large.values())).all()


@pytest.fixture
def gpu_benchmark(tmp_path, monkeypatch):
    """The benchmark of GPUs on this CPU: a function of more options; results in a file."""
    monkeypatch.setattr(attention_gpu, 'REPEATS', 1)
    monkeypatch.setattr(attention_gpu, 'RESULTS', tmp_path / 'earlier')
    out = tmp_path / 'new' / 'found.json'

    def run(*more):
        code = attention_gpu.main(['--device', 'cpu', '--model', 'vggt-tiny', '--size', '56x42',
                                   '--out', str(out), *more])
        return code, json.loads(out.read_text()) if out.exists() else None
    return run


def test_points_are_kept_as_they_come_and_not_measured_twice(gpu_benchmark, monkeypatch, capsys):
    code, found = gpu_benchmark('--variants', 'softmax', '--views', '2')
    key = 'vggt-tiny 56x42 | 2 views | softmax'
    assert code == 0 and list(found['rows']) == [key] and found['provenance']['torch']
    row = found['rows'][key]
    assert row['seconds'] == pytest.approx(row['encoder_s'] + row['blocks_s'] + row['heads_s'])

    whole, asked = attention_gpu.measure, []

    def full_at_three(network, views, options):
        asked.append(views)
        if views == 3:
            raise RuntimeError('CUDA out of memory. Tried to allocate 9 GiB')
        return whole(network, views, options)
    monkeypatch.setattr(attention_gpu, 'measure', full_at_three)
    _, found = gpu_benchmark('--variants', 'softmax', 'ttt', '--views', '4', '3', '2')
    rows = found['rows']
    assert rows[key] == row and asked == [3, 2, 3]
    assert rows['vggt-tiny 56x42 | 3 views | softmax'] == {'views': 3, 'out_of_memory': True}
    assert 'vggt-tiny 56x42 | 4 views | softmax' not in rows
    capsys.readouterr()
    gpu_benchmark('--table')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows) and any('out of memory' in line for line in lines)
    assert any('| ttt' in line and line.endswith('x') for line in lines)


def test_what_may_end_too_late_is_left_for_another_call(gpu_benchmark, capsys):
    _, found = gpu_benchmark('--variants', 'latent', '--views', '2', '400', '--limit-s', '5')
    assert list(found['rows']) == ['vggt-tiny 56x42 | 2 views | latent']
    assert 'latent: 400 views are left' in capsys.readouterr().out


def test_settings_that_change_the_time_are_part_of_the_name():
    options = attention_gpu.parsed(['--ttt-steps', '2', '--offload', '--sdpa', 'flash'])
    assert attention_gpu.key_of('ttt', 50, options).endswith('50 views | ttt, 2 steps, offload')
    assert attention_gpu.key_of('softmax', 50, options).endswith('softmax, offload, flash')


def test_operations_are_those_that_torch_counts():
    network = build('vggt-tiny', 'ttt')
    layer = network.aggregator.global_blocks[0].attn
    assert isinstance(layer, TttAttention)
    positions = torch.cartesian_prod(torch.arange(3), torch.arange(4)) + 1
    positions = torch.cat((torch.zeros(5, 2, dtype=torch.long), positions))
    x = torch.rand(1, 2 * 17, layer.config.dim)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        layer(x, layer.empty_state(1), positions=positions, frames=2, tokens_per_frame=17,
              write=True)
    special = 18 * layer.config.dim * 2 * 5  # pass the convolution by
    assert counted.get_total_flops() == pytest.approx(layer_flops(layer, 34) - special)


def test_the_update_has_a_rate():
    row = update_row(build('vggt-tiny', 'ttt'), 2, (42, 56))
    assert row['update_tflops'] > 0 and row['update_of_peak'] is None
    assert row['layer_ms'] > 0 and row['update_ms'] > 0
