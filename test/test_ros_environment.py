"""Set-up of the tests: which machines get ROS wheels, and that no skip goes unnoticed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ros_support import environment

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest
def test_left_out():
    pytest.skip('data: nothing there')
def test_also_left_out():
    pytest.skip('data: nothing there')
@pytest.mark.xfail(reason='data: known')
def test_known():
    assert False
def test_good():
    pass
"""
CONFTEST = """
from ros_support.skips import SkipReport
def pytest_configure(config):
    config.pluginmanager.register(SkipReport({{'data:': {there}, 'ros:': True}}))
"""


@pytest.mark.parametrize(('there', 'code'), [(False, 0), (True, 1)])
def test_a_skip_fails_the_run_when_what_it_needs_is_there(tmp_path, there, code):
    (tmp_path / 'test_some.py').write_text(TESTS)
    (tmp_path / 'conftest.py').write_text(CONFTEST.format(there=there))
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
                           str(tmp_path)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                          env={**os.environ, 'PYTHONPATH': str(ROOT / 'test')}, check=False)
    assert '   2  data: nothing there' in done.stdout
    assert ('FAILURE' in done.stdout) == there
    assert done.returncode == code


@pytest.mark.parametrize(('attribute', 'value', 'reason'), [
    ('machine', 'aarch64', 'none for linux on aarch64'),
    ('python_implementation', 'PyPy', 'none for Python')])
def test_machines_without_wheels_are_told_so(monkeypatch, attribute, value, reason):
    monkeypatch.delenv('ROS_DISTRO', raising=False)
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(platform, attribute, lambda: value)
    assert reason in environment.why_no_wheels()


def test_a_ros_installation_is_left_alone(monkeypatch):
    monkeypatch.setenv('ROS_DISTRO', 'jazzy')
    assert 'jazzy is sourced' in environment.why_no_wheels()
    monkeypatch.setattr(environment, 'call', None)  # nothing may be run
    environment.install_wheels()
    assert environment.generate_tf2_msgs() is True


def test_missing_build_tools_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv('ROS_DISTRO', raising=False)
    monkeypatch.setattr(environment, 'why_no_wheels', lambda: '')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert environment.generate_tf2_msgs() is False
    assert 'apt install cmake make gcc g++' in capsys.readouterr().out


def test_every_ros_requirement_is_pinned():
    def names(path):
        lines = (ROOT / path).read_text().splitlines()
        return [Requirement(line) for line in lines if line and line[0] not in '#-']

    pinned = {requirement.name for requirement in names('constraints-ros.txt')}
    assert all('==' in str(requirement) for requirement in names('constraints-ros.txt'))
    for path in ('requirements-ros.txt', 'test/ros_support/requirements-generator.txt'):
        asked = {requirement.name for requirement in names(path)}
        assert asked - pinned <= {'numpy', 'setuptools'}
