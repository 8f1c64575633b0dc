import pytest

from baleen.config import UserError
from baleen.cost.bubble import bubble_seconds, least_wait
from baleen.cost.calibration import Calibration
from baleen.cost.hardware import find_hardware
from baleen.cost.layout import Layout, StatedLayout
from baleen.cost.memory import rank_memory
from baleen.cost.planned_model import load_model
from baleen.cost.search import (
    Conditions,
    divisible_layouts,
    explain_no_layout,
    search_layouts,
    user_layout,
    workload,
)
from baleen.cost.simulator import Durations
from baleen.cost.step import step_time

H800 = find_hardware("h800")
V3 = load_model("v3-671b")
DENSE = load_model("llama3-8b")
PRIORS = Calibration()


def conditions(model=DENSE, **changes):
    mtp = model.arch.num_nextn_predict_layers > 0
    fields = {"hardware": H800, "precision": "bf16", "seq_len": 4096, "batch": model.batch, "mtp": mtp}
    return Conditions(**{**fields, **changes})


def test_the_search_finds_what_trying_everything_finds():
    """Layouts that are never executed must indeed be slower than the ones reported."""
    on = conditions()
    found = search_layouts(DENSE, 16, on, PRIORS, StatedLayout(recompute="operators"), top=3)
    everything = []
    for layout in divisible_layouts(DENSE, 16, on, StatedLayout(recompute="operators")):
        work = workload(DENSE, layout, on)
        memory = rank_memory(DENSE.arch, layout, seq_len=4096, micro_batches=int(work.micro_batches), mtp=False)
        if memory.total <= 0.95 * 80e9:
            everything.append(step_time(work, PRIORS).seconds)
    assert found.tried >= len(everything) > 10
    assert [c.step.seconds for c in found.best] == pytest.approx(sorted(everything)[:3])


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"])
def test_the_least_wait_is_below_the_bubble(schedule):
    layout = next(
        layout
        for layout in divisible_layouts(DENSE, 16, conditions(), StatedLayout(pipeline=8, schedule=schedule))
        if layout.micro_batches(DENSE.batch) >= 16
    )
    bubble = bubble_seconds(layout, layout.micro_batches(DENSE.batch), Durations(1.0, 2.0, 1.0))
    assert 0 < least_wait(layout, 1.0, 2.0) <= bubble


def test_every_layout_divides_and_can_run():
    on = conditions(V3, precision="fp8")
    layouts = list(divisible_layouts(V3, 256, on, StatedLayout(pipeline=8)))
    assert len(layouts) == len(set(layouts)) > 20
    for layout in layouts:
        assert 256 % (layout.tensor * layout.pipeline) == 0 and V3.arch.n_routed_experts % layout.expert == 0
        assert V3.batch % (layout.data * layout.micro_batch) == 0


def test_user_layout_reads_what_it_prints():
    stated = user_layout("PP16,EP64 ZeRO1,DualPipe,recompute-deepseek")
    assert (stated.pipeline, stated.expert, stated.zero, stated.schedule) == (16, 64, 1, "dualpipe")
    layout = search_layouts(V3, 2048, conditions(V3, precision="fp8"), PRIORS, stated, top=1).best[0].layout
    assert user_layout(str(layout)).model_copy(update={"data": None}) == stated
    assert user_layout("FSDP").zero == 3 and user_layout("DDP,TP2").tensor == 2


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("PP16,EP64,fast", "'fast' is no part"),
        ("PP0", "1 or more"),
        ("", "no part of a layout"),
        ("PP8 FSDP", "ZeRO1 with PP"),
        ("PP16=EP64", "no part"),
        ("PP2 EP256 dualpipe VP2", "VPn is for the interleaved schedule"),
        ("VP4 TP2", "interleaved is a schedule of a pipeline: add PPn"),
        ("dualpipe PP1", "dualpipe is a schedule of a pipeline"),
    ],
)
def test_bad_layout_words(text, fault):
    with pytest.raises(UserError, match=fault):
        user_layout(text)


@pytest.mark.parametrize(
    ("model", "devices", "text", "cure"),
    [
        (V3, 2048, "PP15 EP64", "nearest that does is PP16"),
        (V3, 2048, "PP16 EP48", "nearest that does is EP32"),
        (V3, 2048, "PP64 EP8", "at most PP61"),
        (V3, 2048, "TP3", "nearest that does is TP"),
        (V3, 2048, "PP16 DP100", "nearest number of devices that does is 1600"),
        (DENSE, 64, "EP8", "the model has none"),
    ],
)
def test_layouts_that_do_not_divide_name_the_nearest(model, devices, text, cure):
    on = conditions(model, batch=15360 if model is V3 else model.batch)
    stated = user_layout(text)
    assert not list(divisible_layouts(model, devices, on, stated))
    assert cure in str(explain_no_layout(model, devices, on, stated))


def test_devices_over_which_no_batch_divides_name_the_nearest():
    on = conditions(V3, precision="fp8")
    assert "nearest number of devices with one is" in str(explain_no_layout(V3, 2000, on, StatedLayout()))


def test_with_one_chunk_a_rank_interleaving_is_1f1b():
    one, plain = (Layout(devices=8, pipeline=8, schedule=name) for name in ("interleaved", "1f1b"))
    assert (
        bubble_seconds(one, 64, Durations(1.0, 2.0, 1.0)) == bubble_seconds(plain, 64, Durations(1.0, 2.0, 1.0)) == 21
    )


@pytest.mark.parametrize(
    ("text", "kept"),
    [("PP8,VP2", {"virtual_stages": 2, "schedule": "interleaved"}), ("zb1p", {"schedule": "zb1p"})],
)
def test_what_is_stated_is_kept(text, kept):
    layouts = list(divisible_layouts(DENSE, 16, conditions(), user_layout(text)))
    assert layouts and all(getattr(layout, name) == value for layout in layouts for name, value in kept.items())
    assert all(layout.pipeline > 1 for layout in layouts)
