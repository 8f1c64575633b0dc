"""Marks of tests that want what a machine may lack. What is there has to work: then they fail, and are not skipped."""

import os
import shlex
import shutil

import pytest

from baleen.model.native.library import native_mode

_COMPILERS = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
needs_native = pytest.mark.skipif(
    native_mode() == "off" or not any(map(shutil.which, _COMPILERS)), reason="no C++ compiler, or BALEEN_NATIVE=off"
)
