"""The message of /tf, where it is installed.

Every ROS has tf2_msgs; the wheels on PyPI have not, and `make` generates it where it finds cmake
and a compiler. Without it a node works, reports it, and neither reads nor sends transforms.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

try:
    TFMessage: Any = import_module('tf2_msgs.msg').TFMessage
except ImportError:
    TFMessage = None

NO_TF = ('expected the package tf2_msgs, found none: no transforms are read or sent; install it '
         'with ROS, or cmake and g++ and run make again')
