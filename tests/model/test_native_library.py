"""Compiling native code: once, whole or not at all, for the CPU that is asked for; and PyTorch where it can't be."""

import ctypes
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baleen.config import UserError
from baleen.infer.native import library as inference
from baleen.model.native import library, training
from baleen.model.native.library import compiled, load_library

ROOT = Path(__file__).parents[2]
SOURCES = {"inference": inference.SOURCE, "training": training.SOURCE}
REAL = 'exec c++ "$@"'
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes $CXX a script: whatever it is asked for but its version goes through `body`, its words into a log."""

    def make(body: str) -> Path:
        script, log = tmp_path / "c++", tmp_path / "log"
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo 1\necho "$@" >> {log}\n{body}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))
        return log

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BALEEN_NATIVE", raising=False)
    return make


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source" / "answer.cpp"
    path.parent.mkdir()
    path.with_name("answer.h").write_text("constexpr int ANSWER = 42;\n")
    path.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    return path


def load(source: Path) -> ctypes.CDLL | None:
    return load_library.__wrapped__(source)


def cached(tmp_path: Path) -> set[str]:
    """How the names of what lies in the cache end."""
    return {path.name.split(".")[-1] for path in (tmp_path / "cache" / "baleen" / "native").iterdir()}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'answer.cpp:1: error: no such thing' >&2; exit 1", "error: no such thing"),
        ("exit 4", "exit status 4"),
        ("kill -9 $$", "SIGKILL"),
        ("exit 0", "No such file"),  # it says that all went well, and wrote nothing
    ],
)
def test_a_broken_compiler_is_told_and_pytorch_serves(compiler, source, tmp_path, body, reason, capsys, monkeypatch):
    compiler(body)
    assert load(source) is None
    assert reason in capsys.readouterr().err
    monkeypatch.setenv("BALEEN_NATIVE", "require")
    with pytest.raises(UserError, match=reason):
        load(source)
    assert cached(tmp_path) == {"lock"}


def test_without_a_compiler_pytorch_serves(source, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load(source) is None
    assert "no C++ compiler" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_names_the_cure(compiler, source, tmp_path, capsys):
    compiler(REAL)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load(source) is None
    assert "set XDG_CACHE_HOME" in capsys.readouterr().err


@needs_compiler
def test_a_library_that_is_there_needs_no_right_to_write(compiler, source):
    compiler(REAL)
    made = compiled(source)
    lock = made.with_name("lock")
    lock.unlink()
    lock.mkdir()  # cannot be opened to be written, whoever asks
    assert compiled(source) == made
    source.write_text(source.read_text() + "\n")
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        compiled(source)


@needs_compiler
def test_however_many_ask_it_is_compiled_once(compiler, source, tmp_path):
    log = compiler("sleep 0.2\n" + REAL)
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(compiled, [source] * 4))
    assert len(made) == 1 and len(log.read_text().splitlines()) == 1
    library = load(source)
    assert library is not None and library.answer() == 42
    assert cached(tmp_path) == {"lock", "so"}


@needs_compiler
def test_what_a_killed_process_left_is_swept_away(compiler, source, tmp_path):
    compiler(REAL)
    folder = tmp_path / "cache" / "baleen" / "native"
    folder.mkdir(parents=True)
    (folder / "answer-0123.part").write_text("half")
    compiled(source)
    assert cached(tmp_path) == {"lock", "so"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_the_compiler_holds_the_lock(compiler, source, tmp_path):
    """So what a killed process left running cannot write beside the next one's compiler."""
    compiler(f"ls -l /proc/$$/fd > {tmp_path}/open; exit 1")
    assert load(source) is None
    assert str(tmp_path / "cache" / "baleen" / "native" / "lock") in (tmp_path / "open").read_text()


@needs_compiler
def test_what_it_is_made_of_makes_another_library(compiler, source, monkeypatch):
    log = compiler(REAL)
    first = compiled(source)
    source.with_name("answer.h").write_text("constexpr int ANSWER = 43;\n")
    second = compiled(source)
    assert ctypes.CDLL(str(first)).answer() == 42 and ctypes.CDLL(str(second)).answer() == 43
    arch = "x86-64-v2" if X86 else "generic"
    monkeypatch.setenv("BALEEN_NATIVE_ARCH", arch)
    assert compiled(source) not in (first, second)
    words = log.read_text().splitlines()
    assert "=native " in words[1] and f"={arch} " in words[2]


@needs_compiler
def test_an_image_s_library_serves_on_another_machine(compiler, source, monkeypatch):
    """One compiled for a named CPU is found on every CPU, with any compiler or none; `native` is for this one."""
    log = compiler(REAL)
    here = compiled(source)
    monkeypatch.setenv("BALEEN_NATIVE_ARCH", "x86-64" if X86 else "generic")
    carried = compiled(source)
    monkeypatch.setattr(library, "_cpu_features", lambda: "another")
    monkeypatch.setenv("CXX", "/no/compiler")
    assert compiled(source) == carried and load(source).answer() == 42
    compiler(REAL)
    monkeypatch.delenv("BALEEN_NATIVE_ARCH")
    assert compiled(source) not in (here, carried)
    assert len(log.read_text().splitlines()) == 3


@needs_compiler
@pytest.mark.skipif(not X86, reason="compiles for x86")
@pytest.mark.parametrize("arch", ["x86-64-v3", "cooperlake", pytest.param("x86-64-v2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SOURCES)
def test_other_cpus_are_compiled_for_without_warnings(name, arch):
    flags = ("-std=c++17", "-fopenmp", f"-march={arch}", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only")
    done = subprocess.run(["c++", *flags, SOURCES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="compiles for x86")
@pytest.mark.parametrize("arch", ["x86-64", "x86-64-v3", "x86-64-v4", "cooperlake"])
def test_kernels_for_other_cpus_equal_their_twins(arch, tmp_path):
    """The tests of both libraries again, compiled for a CPU without AVX, with AVX2, with AVX-512, and with its BF16."""
    needs = {"x86-64-v3": "avx2", "x86-64-v4": "avx512bw", "cooperlake": "avx512_bf16"}.get(arch, "")
    if needs not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {needs}")
    env = {**os.environ, "BALEEN_NATIVE_ARCH": arch, "BALEEN_NATIVE": "require", "XDG_CACHE_HOME": str(tmp_path)}
    tests = ["tests/infer/test_native.py", "tests/model/test_fused.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    skipped = re.search(r" passed, (\d+) skipped", done.stdout)  # what is for bf16 alone
    assert " passed" in done.stdout and (skipped and skipped[1]) == (None if arch == "cooperlake" else "1")
