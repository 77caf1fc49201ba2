"""Real ROS 2 nodes without a ROS installation: wheels from PyPI, and the message of /tf.

python test/ros_support/environment.py wheels STAMP
python test/ros_support/environment.py tf2_msgs STAMP

Both work on the environment that runs them, say in one line what they leave out and why, and
touch STAMP once there is nothing left to do. PyPI has no tf2_msgs, so it is generated here, in
an environment of its own: its build tools want an old setuptools.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHONS = ((3, 10), (3, 14))
# Set by the wheels at start-up for their own environment; wrong for the generator's.
LEAKED = ('_ROS_WHEELS_BOOTSTRAP_COMPLETE', 'LD_LIBRARY_PATH')


def why_no_wheels() -> str:
    """Why this machine takes no ROS wheels, or ''."""
    if 'ROS_DISTRO' in os.environ:
        return f'ROS {os.environ["ROS_DISTRO"]} is sourced and used instead'
    if sys.platform != 'linux' or platform.machine() != 'x86_64':
        return f'there are none for {sys.platform} on {platform.machine()}'
    if platform.python_implementation() != 'CPython' or not (
            PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]):
        return f'there are none for Python {platform.python_version()}'
    return ''


def why_no_generator() -> str:
    """Why tf2_msgs cannot be built here, or ''."""
    packages = {'cmake': 'cmake', 'make': 'make', 'cc': 'gcc', 'c++': 'g++'}
    missing = [package for tool, package in packages.items() if shutil.which(tool) is None]
    return f'apt install {" ".join(missing)} for the tests of /tf' if missing else ''


def install_wheels() -> None:
    """Install the wheels that requirements-ros.txt names into this environment."""
    reason = why_no_wheels()
    if reason:
        say(f'no ROS wheels: {reason}')
        return
    pip(Path(sys.executable), '--requirement', ROOT / 'requirements-ros.txt')


def generate_tf2_msgs() -> bool:
    """Build tf2_msgs into this environment; False where a tool is missing."""
    if why_no_wheels():
        return True
    reason = why_no_generator()
    if reason:
        say(f'no tf2_msgs: {reason}')
        return False
    build = Path(sys.prefix) / 'ros-build'
    python = build / 'generator' / 'bin' / 'python'
    shutil.rmtree(build, ignore_errors=True)
    call(sys.executable, '-m', 'venv', build / 'generator')
    pip(python, '--requirement', HERE / 'requirements-generator.txt')
    environment = {**clean_environment(), 'AMENT_PREFIX_PATH': str(build / 'generator')}
    environment['PATH'] = f'{python.parent}{os.pathsep}{environment["PATH"]}'
    log = build / 'cmake.log'
    for command in (
            ('cmake', '-S', HERE / 'tf2_msgs', '-B', build / 'cmake', '-Wno-dev',
             '-DCMAKE_BUILD_TYPE=Release', '-DBUILD_TESTING=OFF',
             f'-DCMAKE_PREFIX_PATH={build / "generator"}',
             f'-DCMAKE_INSTALL_PREFIX={sys.prefix}', f'-DPython3_EXECUTABLE={python}'),
            ('cmake', '--build', build / 'cmake', '--parallel', '2'),
            ('cmake', '--install', build / 'cmake')):
        run_logged(command, environment, log)
    shutil.rmtree(build)
    say('tf2_msgs generated')
    return True


def run_logged(command: tuple[object, ...], environment: dict[str, str], log: Path) -> None:
    """Run one step of the build; its output is shown only when it fails."""
    with log.open('a') as out:
        done = subprocess.run([str(word) for word in command], env=environment, stdout=out,
                              stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.stderr.write(log.read_text()[-4000:])
        raise SystemExit(f'tf2_msgs was not built: {command[0]} {command[1]} failed, see {log}')


def pip(python: Path, *arguments: object) -> None:
    """Run pip install of another (or this) environment."""
    call(python, '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet', *arguments)


def call(*command: object) -> None:
    """Run a command, stopping here when it fails."""
    done = subprocess.run([str(word) for word in command], env=clean_environment(), check=False)
    if done.returncode:
        raise SystemExit(f'failed: {" ".join(map(str, command))}')


def clean_environment() -> dict[str, str]:
    """Environment variables without those that the wheels set for this process."""
    return {name: value for name, value in os.environ.items() if name not in LEAKED}


def say(text: str) -> None:
    """One line for the person who runs make."""
    sys.stdout.write(f'ros: {text}\n')


def main() -> None:
    """Do the step that the command line names."""
    step, stamp = sys.argv[1:]
    if {'wheels': install_wheels, 'tf2_msgs': generate_tf2_msgs}[step]() is not False:
        Path(stamp).touch()


if __name__ == '__main__':
    main()
