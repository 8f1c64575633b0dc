"""From a C++ file to a loaded library: compiled by the machine's own compiler, kept in the user's cache folder.

No header but the standard ones and OpenMP is needed, so that a file compiles in seconds; tensors pass as pointers.
`BALEEN_NATIVE` says whether native code is used: `auto` (where it compiles), `require` (an error where it does not) or
`off`. A library is found again under a hash of its source, compiler, flags and CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # brings the OpenMP runtime that our libraries must share: two pools of threads would fight

from baleen.config import UserError

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
MODES = ("auto", "require", "off")


def native_mode() -> str:
    """BALEEN_NATIVE, `auto` by default. Raises UserError for anything but the three modes."""
    mode = os.environ.get("BALEEN_NATIVE", "auto")
    if mode not in MODES:
        raise UserError(f"BALEEN_NATIVE is {mode!r}: take one of {', '.join(MODES)}")
    return mode


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """The library made of one C++ file; None where native code is off, or does not compile and is not required.

    Raises UserError where it is required and does not compile.
    """
    mode = native_mode()
    if mode == "off":
        return None
    try:
        return ctypes.CDLL(str(compiled(source)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = _reason(error)
        if mode == "require":
            raise UserError(f"BALEEN_NATIVE=require, but {source.name} does not compile here: {reason}") from None
        print(f"baleen: no native kernels ({reason}); PyTorch computes the same, slower", file=sys.stderr)
        return None


def compiled(source: Path) -> Path:
    """Path of the library, compiled if it is not in the cache yet. Raises OSError or SubprocessError."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]  # it may include any of them
    parts = (*texts, compiler, version, *FLAGS, platform.machine(), _cpu_features())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baleen" / "native"
    library = folder / f"{source.stem}-{key}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: two processes may compile at once.
        print(f"baleen: compiling {source.name}, once for this machine", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / library.name
            subprocess.run([compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, check=True, text=True)
            made.replace(library)
    return library


def _cpu_features() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr).splitlines() if "error" in line] or [str(error)]
        return lines[0]
    return str(error)
