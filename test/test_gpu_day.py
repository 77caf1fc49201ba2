"""The script for a day on a GPU: what it asks for exists, and parts are done once."""

import importlib
import json
import os
import shlex
import subprocess

import pytest

from benchmarks import attention_gpu, gpu_goals, network_pieces, training_throughput
from benchmarks.common import REPOSITORY

SCRIPT = REPOSITORY / 'benchmarks' / 'gpu_day.sh'
PARTS = {'attention_ttt', 'attention_sparse', 'attention_softmax', 'update', 'pieces', 'rooms',
         'throughput', 'training'}
PARSERS = {'attention_gpu': attention_gpu.parsed,
           'network_pieces': lambda given: network_pieces._parser().parse_args(given),
           'training_throughput': lambda given: training_throughput._parser().parse_args(given)}
# Writes down how it was called, and fails where its arguments have the words in FAIL.
STUB = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
[ -z "${FAIL:-}" ] || case "$*" in *"$FAIL"*) exit ${CODE:-1} ;; esac
"""


@pytest.fixture
def day(tmp_path):
    """Run the script with a stub in the place of Python: exit code, commands, what it said."""
    stub, calls = tmp_path / 'python', tmp_path / 'calls'
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(**variables):
        calls.write_text('')
        given = {'PYTHON': str(stub), 'CALLS': str(calls), 'PHOTOS': str(tmp_path), **variables}
        done = subprocess.run(['bash', str(SCRIPT), str(tmp_path / 'out')], check=False,
                              env={**os.environ, **given}, capture_output=True, text=True)
        return done.returncode, [shlex.split(line) for line in
                                 calls.read_text().splitlines()], done.stdout
    return run


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_every_benchmark_takes_the_options_it_is_given(day, device):
    code, commands, _ = day(DEVICE=device)
    assert code == 0
    asked = {command[1]: command[2:] for command in commands if command[0] == '-m'}
    assert set(asked) == {f'benchmarks.{name}' for name in (*PARSERS, 'gpu_goals')}
    for command in commands:
        name = command[1].removeprefix('benchmarks.')
        if name in PARSERS:
            assert PARSERS[name](command[2:]).device == device
    for module in asked:
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main(['--help'])
        assert ended.value.code == 0


def test_a_part_that_fails_keeps_no_other_from_running_and_is_done_next_time(day, tmp_path):
    code, _, said = day(DEVICE='cuda', FAIL='network_pieces')
    assert code == 1 and 'pieces: failed with exit code 1' in said
    assert 'not done: pieces; call this again' in said
    assert {file.stem for file in (tmp_path / 'out').glob('*.json')} == PARTS - {'pieces'}
    code, commands, _ = day(DEVICE='cuda')
    assert code == 0
    assert [command[1] for command in commands] == ['benchmarks.network_pieces',
                                                    'benchmarks.gpu_goals']
    assert {file.stem for file in (tmp_path / 'out').glob('*.json')} == PARTS


def test_points_that_are_left_for_another_call_leave_their_part_open(day):
    code, _, said = day(DEVICE='cuda', FAIL='softmax', CODE=str(attention_gpu.LEFT))
    assert code == 1 and 'attention_softmax: the time is over, the next call goes on' in said


def test_without_photos_only_the_training_is_left_out(day):
    code, commands, said = day(DEVICE='cuda', PHOTOS='')
    assert code == 0 and 'training: left out' in said
    assert not [command for command in commands if 'training' in ' '.join(command)]


def test_speed_ups_are_over_the_fastest_softmax_that_fitted(tmp_path, capsys):
    def key(views, label):
        return f'vggt-1b 518x392 | {views} views | {label}'
    rows = {key(1000, 'ttt'): {'views': 1000, 'seconds': 10.0},
            key(1000, 'softmax'): {'views': 1000, 'seconds': 150.0},
            key(1000, 'softmax, flash'): {'views': 1000, 'seconds': 120.0},
            key(1500, 'ttt'): {'views': 1500, 'seconds': 15.0},
            key(1500, 'softmax, flash'): {'views': 1500, 'out_of_memory': True},
            key(1000, 'ttt update'): {'update_of_peak': 0.4, 'layer_of_peak': 0.5}}
    attention_gpu.save(tmp_path / 'attention_all.json', {}, rows)
    assert gpu_goals.main([str(tmp_path)]) == 0
    found = json.loads((tmp_path / 'goals.json').read_text())['rows']
    assert found == {key(1000, 'ttt'): {'faster': 12.0, 'goal': 11.6},
                     key(1000, 'ttt update'): {'update_of_peak': 0.4, 'layer_of_peak': 0.5}}
    assert 'faster 12, goal 11.6' in capsys.readouterr().out


def test_the_pieces_of_a_network_add_up_and_the_truth_stands_in_for_random_weights():
    frames = network_pieces.rendered_walk(6, (112, 84))
    row = network_pieces.pieces_of('vggt-tiny', 'cpu', frames,
                                   network_pieces.WindowConfig(6, 2))
    assert row['weights'] == 'random' and row['tracked'] == 6 and row['memory'] is None
    parts = ('prepare', 'encoder', 'blocks', 'camera_head', 'depth_head', 'other', 'answer',
             'mapping')
    assert all(row[part] > 0 for part in parts)
    assert row['seconds'] == pytest.approx(sum(row[part] for part in parts))


def test_rates_of_training_are_work_over_time():
    rows = [{'images': 8, 'gflop': 100.0, 'seconds': 1.0, 'cpu_seconds': 0.5, 'draw_s': 0.1},
            {'images': 8, 'gflop': 300.0, 'seconds': 3.0, 'cpu_seconds': 1.5, 'draw_s': 0.3}]
    found = training_throughput.together(rows, 2)
    assert found['views_per_s'] == 4 and found['gflops_per_core'] == 50
    assert found['gflops_per_cpu_second'] == 200 and found['draw_s'] == pytest.approx(0.2)
