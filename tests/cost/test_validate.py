"""Validation: reading cases, fitting without the row's own source, errors beside the baseline."""

import csv

import pytest

from baleen.config import UserError
from baleen.cost.calibration import CONSTANTS, shipped_fit
from baleen.cost.cases import COLUMNS, case_architecture, published_mwh, read_cases, shipped_cases, stated_layout
from baleen.cost.flops import matmul_parameters, parameters, training_flops
from baleen.cost.validate import render, validate

SHIPPED = {case.id: case for case in shipped_cases()}
FEW = ["seqsel-22b-full", "seqsel-22b-sel", "lf-mpt7b-h100-8-s2048", "mb-llama3-8b-h100", "tt-8b-8", "dsv3-step-mpft"]


def write(path, ids, **changes):
    rows = [SHIPPED[name].text | changes for name in ids]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_counts_agree_with_the_derived_columns_of_the_cases():
    checked = 0
    for case in SHIPPED.values():
        if not case.text["dims"]:
            continue
        arch = case_architecture(case)
        stated = float(case.text["total_params_B"]), float(case.text["active_matmul_params_B"])
        assert parameters(arch)["total"] / 1e9 == pytest.approx(stated[0], rel=0.005, abs=0.006)
        assert matmul_parameters(arch) / 1e9 == pytest.approx(stated[1], rel=0.005, abs=0.006)
        if arch.sliding_window is None:  # the column counts sliding layers as full
            counted = training_flops(arch, int(case.text["seq"]), mtp=True) / 1e9
            assert counted == pytest.approx(float(case.text["gflop_per_token_causal"]), rel=0.003, abs=0.006)
        checked += 1
    assert checked > 70


def test_the_shipped_fit_halves_the_baseline_and_never_saw_an_anchor():
    fitted = shipped_fit()
    for kind, goal in (("step", 0.12), ("run", 0.18)):
        assert fitted.errors[kind]["mape"] <= fitted.errors[kind]["baseline_mape"] / 2
        assert fitted.errors[kind]["mape"] <= goal
    assert {SHIPPED[name].text["split"] for name in fitted.rows} == {"cal"}
    assert set(fitted.constants) == set(CONSTANTS)
    assert {SHIPPED[name].source for name in fitted.rows} == set(fitted.without_source)


def test_fitted_rows_are_predicted_without_their_source_and_others_with_all(tmp_path):
    result = validate(write(tmp_path / "cases.csv", FEW))
    assert result["kinds"]["step"]["n"] == len(FEW)
    assert result["kinds"]["step"]["mape"] < result["kinds"]["step"]["baseline_mape"] / 2
    assert set(result["splits"]) == {"anchor", "cal"}
    by_id = {row["id"]: row for row in result["rows"] if row["kind"] == "step"}
    sets = [f"{name}={value!r}" for name, value in shipped_fit().constants.items()]
    given = validate(write(tmp_path / "cases.csv", FEW), sets=sets)
    same = {row["id"]: row for row in given["rows"] if row["kind"] == "step"}
    assert by_id["dsv3-step-mpft"]["predicted"] == same["dsv3-step-mpft"]["predicted"]
    assert by_id["tt-8b-8"]["predicted"] != same["tt-8b-8"]["predicted"]
    assert "tt-8b-8" in render(result)


def test_a_sceptic_changes_one_factor_and_sees_the_effect(tmp_path):
    path = write(tmp_path / "cases.csv", ["tt-8b-8"])
    plain, jittery, halved = (
        next(row for row in validate(path, sets=sets)["rows"] if row["kind"] == "step")["predicted"]
        for sets in ((), ["attention=3"], ["memory_tb_s=1.2"])
    )
    assert jittery < plain and halved < plain
    for wrong, message in (("atention=2", "did you mean 'attention'"), ("attention=-1", "positive")):
        with pytest.raises(UserError, match=message):
            validate(path, sets=[wrong])


def test_the_makers_own_benchmarks_are_known_wherever_the_source_names_it(tmp_path):
    rates = [
        validate(write(tmp_path / "cases.csv", ["dsv3-step-mpft"], source=source))["rows"][0]["predicted"]
        for source in ("arXiv 2412.19437", "NVIDIA Megatron-Bridge", "MLPerf Training v5.1 (NVIDIA)")
    ]
    assert rates[1] == rates[2] == pytest.approx(rates[0] / shipped_fit().constants["vendor"])


def test_memory_and_energy_follow_their_factors(tmp_path):
    path = write(tmp_path / "cases.csv", ["tt-8b-8", "olmo2-7b-energy"])
    plain, changed = (
        {
            row["kind"]: row["predicted"]
            for row in validate(path, sets=sets)["rows"]
            if row["kind"] in ("memory", "energy")
        }
        for sets in ((), ["draw_share=0.375", "allocated_over_used=2.1"])
    )
    assert changed["memory"] == pytest.approx(2 * plain["memory"])
    assert changed["energy"] == pytest.approx(plain["energy"] / 2)


def test_memory_is_compared_in_gib(tmp_path):
    result = validate(write(tmp_path / "cases.csv", ["tt-8b-8"]))
    row = next(row for row in result["rows"] if row["kind"] == "memory")
    assert row["published"] == 77.0
    assert abs(row["relative_error"]) < 0.1


def test_calibrating_on_a_split_of_the_file(tmp_path):
    path = write(tmp_path / "cases.csv", FEW)
    result = validate(path, calibrate_on="cal")
    assert result["constants"] != dict(shipped_fit().constants)
    with pytest.raises(UserError, match="never fitted on"):
        validate(path, calibrate_on="anchor")
    with pytest.raises(UserError, match="the file's splits are anchor, cal"):
        validate(path, calibrate_on="test")


def test_what_cannot_be_predicted_is_skipped_with_its_reason(tmp_path):
    result = validate(write(tmp_path / "cases.csv", ["palm-540b", "olmo3-project", "tt-8b-8"]))
    reasons = {entry["id"]: entry["reason"] for entry in result["skipped"]}
    assert "no dims" in reasons["palm-540b"]
    assert "'project' is not predicted" in reasons["olmo3-project"]
    unknown = validate(write(tmp_path / "cases.csv", ["tt-8b-8"], gpu="TPUv9"))
    assert "unknown hardware 'TPUv9'" in unknown["skipped"][0]["reason"]


def test_broken_files_are_a_users_mistake(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text("id,type\nx,dense\n")
    with pytest.raises(UserError, match="lacks the columns arch"):
        read_cases(path)
    with pytest.raises(UserError, match=r"row 2 \(tt-8b-8\): n_gpus is -8; it must be positive"):
        read_cases(write(path, ["tt-8b-8"], n_gpus="-8"))
    with pytest.raises(UserError, match="seq is 0.5; it must be at least 1"):
        read_cases(write(path, ["tt-8b-8"], seq="0.5"))
    for dims, fault in (("[1]", "dims must be an object"), ('{"H": 8, "swa": 4096}', "swa is 4096; write")):
        broken = validate(write(path, ["tt-8b-8"], dims=dims))
        assert fault in broken["skipped"][0]["reason"]
    with pytest.raises(UserError, match="step_s is 'fast', not a number"):
        read_cases(write(path, ["tt-8b-8"], step_s="fast"))
    with pytest.raises(UserError, match="is missing"):
        read_cases(tmp_path / "absent.csv")
    assert set(COLUMNS) <= set(SHIPPED["tt-8b-8"].text)


def test_layouts_are_read_from_the_papers_words():
    assert stated_layout(SHIPPED["seqsel-175b-full"]).recompute == "full"
    stated = stated_layout(SHIPPED["tt-70b-256-bf16"])
    assert (stated.tensor, stated.zero, stated.shard, stated.recompute) == (8, 3, 32, "full")
    deepseek = stated_layout(SHIPPED["dsv3-step-mpft"])
    assert (deepseek.pipeline, deepseek.expert, deepseek.schedule) == (16, 64, "dualpipe")
    neox = stated_layout(SHIPPED["mtnlg-280"])  # counts recomputation; DeepSpeed does not interleave
    assert (neox.recompute, neox.virtual_stages) == ("full", 1)


def test_one_source_is_one_paper_or_publisher():
    assert SHIPPED["llama3.1-405b-8k"].source == "2407.21783"
    assert SHIPPED["mb-llama3-8b-h100"].source == SHIPPED["mb-qwen30b-h100"].source == "NVIDIA Megatron-Bridge"
    assert published_mwh(SHIPPED["olmo2-7b-energy"]) == 131


@pytest.mark.slow
def test_leaving_one_source_out_at_a_time():
    """Fitted anew, and the fit that ships is this one."""
    result, shipped = validate(calibrate_on="cal"), shipped_fit()
    assert result["constants"] == pytest.approx(dict(shipped.constants), rel=1e-3, abs=1e-4)
    for kind, goal in (("step", 0.12), ("run", 0.18)):
        errors = result["splits"]["cal"][kind]
        assert errors["mape"] <= min(goal, errors["baseline_mape"] / 2)
        assert {name: errors[name] for name in shipped.errors[kind]} == pytest.approx(shipped.errors[kind], abs=2e-4)
