"""The precision that a CPU is given: bf16 only where it multiplies bf16."""

from types import SimpleNamespace

import pytest
import torch

from baleen.infer.native.runner import fastest_runner
from baleen.infer.runner import TorchRunner
from baleen.model.cache import LatentPages
from baleen.model.rope import inverse_frequencies
from baleen.train import precision
from baleen.train.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.fixture(params=[(False, False), (True, False), (False, True)], ids=["AVX2", "AMX", "AVX-512 BF16"])
def has_bf16(request, monkeypatch):
    amx, avx512 = request.param
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    return amx or avx512


def test_training_takes_bf16_where_it_is_fast(has_bf16):
    assert resolve_precision("auto", CPU) == ("bf16" if has_bf16 else "fp32")
    assert resolve_precision("bf16", CPU) == "bf16"  # whoever asks for it gets it


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((7, 5), None, "fp32"), ((8, 0), None, "bf16"), ((9, 0), None, "bf16"), (None, "6.4", "bf16")],
    ids=["T4", "A100", "H100", "AMD"],
)
def test_gpus_that_only_emulate_bf16_are_given_fp32(monkeypatch, capability, hip, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected
    assert resolve_precision("bf16", torch.device("cuda")) == "bf16"


def test_inference_without_kernels_multiplies_in_bf16_where_it_is_fast(has_bf16, tiny_model, monkeypatch):
    monkeypatch.setattr("baleen.infer.native.runner.native_library", lambda: None)
    model = tiny_model().bfloat16()
    runner = fastest_runner(model, LatentPages(model.config, 4, dtype=torch.bfloat16))
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert isinstance(runner, TorchRunner)
    assert runner.model.model.norm.weight.dtype is runner.pages.latents.dtype is expected


def test_a_model_that_is_cast_keeps_its_angles(tiny_model):
    model = tiny_model()
    angles = inverse_frequencies(model.config)
    for cast in (model.bfloat16(), model.half(), model.to(torch.float64)):
        assert torch.equal(cast.model.rotary.inv_freq, angles) and cast.model.norm.weight.dtype is not torch.float32


@pytest.mark.parametrize(("largest", "set_"), [(1 << 30, 3), (1 << 25, 3), (0, 0)])
def test_freed_memory_is_kept_where_glibc_takes_the_threshold(monkeypatch, largest, set_):
    """Older ones take no more than 32 MB; where none is taken nothing may be set: that ends their own adjustment."""
    taken = []

    def mallopt(option, value):
        if option == -3 and value > largest:
            return 0
        taken.append((option, value))
        return 1

    monkeypatch.setattr(precision.platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr(precision.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    precision.keep_freed_memory()
    assert len(taken) == set_ and (not taken or taken[0] == (-3, largest))
