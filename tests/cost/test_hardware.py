"""The table of devices: every cell has its source, and users can add their own."""

import pytest

from baleen.config import UserError
from baleen.cost.hardware import Hardware, find_hardware, shipped_hardware

OWN = """
[sources]
me = {{ title = "my measurement", date = "2026-11" }}
[toaster]
title = "A toaster"
generation = "cpu"
peak_fp32 = [{peak}, "{source}"]
memory_gb = [4, "me"]
memory_tb_s = [0.02, "me"]
"""


def test_every_cell_has_source_and_date():
    for device in shipped_hardware().values():
        cells = {
            name for name, field in Hardware.model_fields.items()
            if name not in ("name", "title", "generation", "aliases", "sources")
            and getattr(device, name) != field.default
        }  # fmt: skip
        assert cells <= set(device.sources), device.name
        assert all(source.endswith(")") and "(20" in source for source in device.sources.values())


@pytest.mark.parametrize(
    ("name", "found"), [("H800-SXM", "h800"), ("A100-SXM-40", "a100-sxm-40"), ("h100", "h100"), ("GB300", "gb300")]
)
def test_names_of_the_cases_are_known(name, found):
    assert find_hardware(name).name == found


def test_unknown_hardware_lists_the_known_and_how_to_add_one():
    with pytest.raises(UserError, match=r"unknown hardware 'TPUv4': known are .*h800.*--hardware FILE.toml"):
        find_hardware("TPUv4")


def test_precision_a_device_lacks():
    assert find_hardware("h100").peak_flops("fp8") == 1979e12
    with pytest.raises(UserError, match="has no fp8 peak in the table; it has bf16"):
        find_hardware("a100").peak_flops("fp8")


def test_a_users_file_is_read_and_its_faults_are_named(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(OWN.format(peak=0.2, source="me"))
    assert find_hardware("toaster", path).peak_flops("fp32") == 0.2e12
    path.write_text(OWN.format(peak=-1, source="me"))
    with pytest.raises(UserError, match="toaster.peak_fp32: Input should be greater than 0"):
        find_hardware("toaster", path)
    path.write_text(OWN.format(peak=1, source="you"))
    with pytest.raises(UserError, match="names source 'you', which is not under"):
        find_hardware("toaster", path)
    for text in ("not toml at all", "x = " + "9" * 5000):
        path.write_text(text)
        with pytest.raises(UserError, match="not valid TOML"):
            find_hardware("toaster", path)
    with pytest.raises(UserError, match="is missing"):
        find_hardware("toaster", tmp_path / "absent.toml")


def test_an_unmeasured_format_reaches_the_share_of_the_measured_one():
    assert find_hardware("mi300x").achieved_share("fp8") == pytest.approx(668 / 1307)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("version = 1", "version stands alone"),
        ("[sources]\nme = 'my own'", "sources.me must be"),
        ("[sources]\nme = { title = 'undated' }", "sources.me must be"),
    ],
)
def test_what_is_no_table_of_devices(tmp_path, text, fault):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=fault):
        find_hardware("toaster", path)
