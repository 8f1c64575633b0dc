"""From a C++ file to a loaded library: compiled by the machine's own compiler, kept in the user's cache folder.

No header but the standard ones and OpenMP is needed, so that a file compiles in seconds; tensors pass as pointers.
`BALEEN_NATIVE` says whether native code is used: `auto` (where it compiles), `require` (an error where it does not) or
`off`. `BALEEN_NATIVE_ARCH` names the CPU to compile for, in the compiler's words (`native`: this one), for an image
that is built on one machine and run on others, with a compiler or without. A library is found again under a hash of its
source and flags, and where it is for this CPU alone of the CPU and the compiler.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch  # brings the OpenMP runtime that our libraries must share: two pools of threads would fight

from baleen.config import UserError

# For some AMD CPUs GCC takes an FMA apart in one kernel and not in the next: then a sum depends on how many rows it is
# computed with. Clang does not, and warns of the parameter at most.
FLAGS = (
    "-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "--param=avoid-fma-max-bits=0", "-shared",
    "-fPIC",
)  # fmt: skip
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
    flags = (*FLAGS, _target())
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]  # it may include any of them
    parts = (*texts, *flags, platform.machine(), *(_here() if flags[-1].endswith("=native") else ()))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baleen" / "native"
    library = folder / f"{source.stem}-{key}.so"
    if not library.is_file():
        _compile([*_compiler(), *flags, str(source)], library)
    return library


def _compile(command: list[str], library: Path) -> None:
    """Whole or not at all, and once, however many processes of a machine ask for it at the same moment."""
    folder, aside = library.parent, library.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error}): set XDG_CACHE_HOME to a folder that can") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file():
            return
        for left in folder.glob("*.part"):  # by a process that was killed
            left.unlink()
        print(f"baleen: compiling {Path(command[-1]).name}, once for this machine", file=sys.stderr)
        # The compiler inherits the lock: should this process be killed, nobody writes beside what it left running.
        descriptors = (lock.fileno(),)
        subprocess.run([*command, "-o", str(aside)], capture_output=True, check=True, text=True, pass_fds=descriptors)
        aside.replace(library)


def _compiler() -> list[str]:
    """$CXX, or the first C++ compiler on the path."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise FileNotFoundError("there is no C++ compiler")
    return [found]


def _target() -> str:
    arch = os.environ.get("BALEEN_NATIVE_ARCH") or "native"
    return f"-mcpu={arch}" if platform.machine() in ("aarch64", "arm64") else f"-march={arch}"


def _here() -> tuple[str, ...]:
    """What `native` depends on: the compiler, and the CPU."""
    compiler = _compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, text=True).stdout
    return *compiler, version, _cpu_features()


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
