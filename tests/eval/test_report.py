import json
import math
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.cost.ledger import Ledger
from baleen.cost.money import RateCard
from baleen.eval import report
from baleen.eval.charts import MAX_POINTS
from baleen.eval.report import read_metrics, shown, write_report
from baleen.recipe import load_recipe

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & 'quoted'"


class Page(HTMLParser):
    """What a browser would see: elements, the text outside scripts, and the scripts' contents."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self.scripts, self._raw = [], "", [], False
        self.feed(html)
        self.data = json.loads(self.scripts[1])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self._raw = tag in ("script", "style")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.text += " "
        self._raw = False

    def handle_data(self, data):
        if not self._raw:
            self.text += data
        elif self.tags[-1][0] == "script":
            self.scripts[-1] += data

    def lines(self, title: str) -> dict:
        panel = next(panel for panel in self.data["panels"] if panel["title"] == title)
        return {line["name"]: line for line in panel["lines"]}


def row(step: int, **more) -> dict:
    return {
        "step": step,
        "tokens": 64 * step,
        "seconds": 30.0 * step,
        "loss": 8 / step,
        "mtp_loss": 9 / step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 2.0 + step,
        "max_violation": 0.5,
        "usd": 0.001 * step,
        **more,
    }


def write_metrics(run_dir, rows) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def page_of(run_dir) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def account(run_dir, stage: str, hours: float, **more) -> None:
    """Two devices at a dollar an hour each."""
    now = [0.0]
    rate = RateCard(1.0, "rental of one", "a test")
    ledger = Ledger.open(run_dir, project="p")
    with ledger.stage(stage, devices=2, device_name="toy", rate=rate, clock=lambda: now[0], **more):
        now[0] = 3600 * hours


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "tiny"
    load = [[0.25, 0.25, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]
    write_metrics(
        path,
        [
            row(1, sample="e t a"),
            row(2, heldout_bpb=4.0, expert_load=load, unheard_of={"x": [1]}),
            row(3, sample="hello there", tokens_per_second=None),
            row(4, heldout_bpb=2.5, expert_load=load[::-1]),
        ],
    )
    overrides = ["model.n_routed_experts=4", "model.num_hidden_layers=3", "model.num_nextn_predict_layers=1"]
    recipe = load_recipe("cpu-s", [*overrides, "model.n_group=1", "model.topk_group=1", "model.num_experts_per_tok=2"])
    (path / "recipe.toml").write_text(recipe.to_toml())
    (path / "summary.json").write_text(
        json.dumps(
            {"heldout_bpb": 1.75, "xz_bpb": 2.6, "ngram_bpb": 1.8, "tokens_trained": 1_234_567, "train_seconds": 475.2}
        )
    )
    account(path, "pretrain", 0.25, purpose="final")
    account(path, "eval", 0.25)
    (tmp_path / "failed").mkdir()
    account(tmp_path / "failed", "pretrain", 0.5, purpose="failed")
    return path


def test_curves_hold_the_rows_of_the_run(run_dir):
    page = page_of(run_dir)
    assert page.data["axes"] == ["tokens", "steps", "minutes"]
    loss = page.lines("Loss")
    assert loss["next token"]["y"] == [8, 4, 2.66667, 2]
    assert loss["token after it (MTP)"]["y"] == [9, 4.5, 3, 2.25]
    assert loss["next token"]["x"] == {
        "tokens": [64, 128, 192, 256],
        "steps": [1, 2, 3, 4],
        "minutes": [0.5, 1, 1.5, 2],
    }
    assert page.lines("Held-out evaluation")["model"] == {
        "name": "model",
        "x": {"tokens": [128, 256], "steps": [2, 4], "minutes": [1, 2]},
        "y": [4, 2.5],
    }
    assert page.lines("Learning rate")["learning rate"]["y"] == [1e-3] * 4
    assert page.lines("Throughput")["tokens per second"]["y"] == [3, 4, 6]
    assert page.data["panels"][1]["baselines"] == [["xz", 2.6], ["byte 6-gram", 1.8]]


def test_head_card_samples_and_recipe_are_there(run_dir):
    page = page_of(run_dir)
    text = " ".join(page.text.split())
    for words in (
        "tiny Recipe cpu-s, 4 steps.",
        "Tokens 1.235M",
        "Time 7:55",
        "Bits per byte 1.750 held out; xz 2.600, byte 6-gram 1.800",
        "Cost, headline $0.500 the final run alone",
        "Cost, full $2.00 all of its project, 4.0 × the headline",
        "step 1 e t a step 3 hello there",
        "dollars $0.500 $2.00 device-hours (toy) 0.5 2",
        "failed or killed $1.00",
        "people not recorded",
        "of the full price, pretrain $1.50 of the full price, eval $0.500",
        "Rate: $1.00 a device-hour, rental of one; a test.",
        "tokens trained 1.235M",
        "n_routed_experts = 4",
    ):
        assert words in text


def test_parameters_are_those_of_the_counter(run_dir):
    from baleen.cost.architecture import from_model_config
    from baleen.cost.flops import active_parameters, parameters

    shape = from_model_config(load_recipe(run_dir / "recipe.toml").model)
    total, active = parameters(shape)["total"] / 1e6, active_parameters(shape) / 1e6
    assert f"Parameters {total:.4g}M {active:.4g}M active per token" in " ".join(page_of(run_dir).text.split())


def test_expert_load_is_shown_over_the_fair_share(run_dir):
    load = page_of(run_dir).data["load"]
    assert load["layers"] == ["layer 1", "layer 2", "MTP 1"]
    assert load["experts"] == 4 and load["x"]["steps"] == [2, 4]
    assert load["ratio"] == [[1, 1, 2, 0, 1, 1, 1, 1, 4, 0, 0, 0], [4, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 0]]


def test_an_mtp_layer_that_joins_late_is_empty_before(run_dir):
    """Its loss has no weight in the first steps, or none in the last."""
    load = [[0.25, 0.25, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]
    write_metrics(run_dir, [row(1, expert_load=load[:2]), row(2, expert_load=load), row(3, expert_load=load[:2])])
    page = page_of(run_dir)
    trunk, mtp = [1, 1, 2, 0, 1, 1, 1, 1], [4, 0, 0, 0]
    assert page.data["load"]["layers"] == ["layer 1", "layer 2", "MTP 1"]
    assert page.data["load"]["x"]["steps"] == [1, 2, 3]
    assert page.data["load"]["ratio"] == [trunk + [None] * 4, trunk + mtp, trunk + [None] * 4]
    assert "left out" not in page.text and "A band is empty while" in page.text


def test_a_load_of_another_shape_is_told_and_left_out(run_dir):
    broken = [[[0.5, 0.5], [1.0]], "much", [[math.nan, 0.5]], [[7.0, 0.5]], [[0.5, 0.5, 0.0]]]
    write_metrics(run_dir, [row(i + 1, expert_load=load) for i, load in enumerate([*broken, [[0.5, 0.5]]])])
    page = page_of(run_dir)
    assert page.data["load"]["x"]["steps"] == [6]
    assert "5 records were left out of the map of expert load" in page.text


def test_untrusted_text_stays_text_wherever_it_stands(tmp_path, monkeypatch):
    run_dir = tmp_path / "<b>run<b>"
    write_metrics(run_dir, [row(1, sample=EVIL)])
    clean = len(page_of(run_dir).tags)
    (run_dir / "recipe.toml").write_text(f'name = "{EVIL}"')
    (run_dir / "summary.json").write_text(json.dumps({EVIL: EVIL, "list": [EVIL, {EVIL: 1}]}))
    account(run_dir, "pretrain", 1.0)
    monkeypatch.setattr(report, "card_notes", lambda card: EVIL)
    page = page_of(run_dir)
    assert len(page.tags) > clean
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [
        {},
        {"id": "data", "type": "application/json"},
        {},
    ]
    assert not {"img", "b"} & {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 7  # the sample, the recipe, four in the summary, one on the card
    assert "<b>run<b>" in page.text


def test_the_page_needs_nothing_from_anywhere(run_dir):
    page = page_of(run_dir)
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not attributes & {"src", "href", "srcset", "action"}
    assert {"content": "width=device-width, initial-scale=1", "name": "viewport"} in [attrs for _, attrs in page.tags]
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert [script.count("plotly.js v") for script in page.scripts] == [1, 0, 0]


def test_what_was_not_recorded_is_said(tmp_path):
    write_metrics(tmp_path / "bare", [{"step": 3}])
    page = page_of(tmp_path / "bare")
    assert page.data["axes"] == ["steps"] and page.data["load"] is None
    for panel in page.data["panels"]:
        assert panel["lines"] == [] and f"This run recorded no {panel['title'].lower()}." in page.text
    for sentence in (
        "recorded no expert load",
        "recorded no samples",
        "There is no cost card: ",
        "This run has no summary.json",
        "This run has no recipe.toml",
    ):
        assert sentence in page.text


def test_damaged_files_are_told_and_left_out(run_dir):
    (run_dir / "summary.json").write_text('{"heldout_bpb": 1.')
    (run_dir / "eval.json").write_text("[]")
    (run_dir / "recipe.toml").write_text("lr = [")
    page = page_of(run_dir)
    assert "summary.json was left out" in page.text and "could not be understood" in page.text
    assert "eval.json was left out" in page.text
    assert "lr = [" in page.text and "Bits per byte 2.500" in " ".join(page.text.split())  # of the last row that has it


@pytest.mark.parametrize(
    "file, results, told",
    [
        ("summary.json", {"heldout_bpb": 1.674}, "1.674"),
        ("train.json", {"status": "done", "heldout_bpb": 1.674}, "1.674"),
        ("train.json", {"status": "stopped", "heldout_bpb": None}, None),
        ("eval.json", {"heldout": True, "bits_per_byte": 1.674}, "1.674"),
        ("eval.json", {"heldout": False, "bits_per_byte": 1.674}, None),
        ("eval.json", {"tasks": {"last-word": {"accuracy": 0.5}}}, None),
    ],
)
def test_what_was_held_out_is_told_of_the_end_if_not_of_the_way(tmp_path, file, results, told):
    run_dir = tmp_path / "run"
    write_metrics(run_dir, [row(1), row(2)])
    (run_dir / file).write_text(json.dumps(results))
    text = " ".join(page_of(run_dir).text.split())
    assert f"Bits per byte {told or '–'} held out" in text
    assert (f"{told} of the model at the end. On the way none was measured" in text) == bool(told)
    assert ("recorded no held-out evaluation" in text) == (told is None)
    assert ("The last evaluation" in text) == (file == "eval.json")


def test_the_end_counts_before_the_way(run_dir):
    (run_dir / "summary.json").unlink()
    assert "Bits per byte 2.500" in " ".join(page_of(run_dir).text.split())
    (run_dir / "train.json").write_text('{"heldout_bpb": 2.25, "train_seconds": 61}')
    text = " ".join(page_of(run_dir).text.split())
    assert "Bits per byte 2.250" in text and "Time 1:01" in text and "On the way" not in text


def test_torn_lines_are_counted_and_a_step_written_twice_counts_once(tmp_path):
    lines = ["", '{"step": 1, "loss": 5}', '{"step": 3, "loss": Na', "[1]", '{"loss": 2}', '{"step": true}', "\x00\xff"]
    lines += [
        '{"step": 2, "loss": NaN}',
        '{"step": 1, "loss": 4, "sample": "a\u2028b"}',
        '{"step": 1' + "0" * 5000 + "}",
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    rows, notices = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0] == {"step": 1, "loss": 4, "sample": "a\u2028b"}
    assert notices == [
        "6 lines were left out of metrics.jsonl: torn or not understood.",
        "1 step was without a finite loss: the curve has a gap there.",
    ]


def test_a_loss_that_is_no_number_is_a_gap(tmp_path):
    write_metrics(tmp_path / "run", [row(1), row(2, loss=math.nan), row(3, loss=math.inf)])
    assert page_of(tmp_path / "run").lines("Loss")["next token"]["y"] == [8, None, None]


def test_half_a_surrogate_pair_in_a_sample_becomes_a_question_mark(tmp_path):
    write_metrics(tmp_path / "run", [row(1, sample="a whale \ud83d")])
    assert "a whale ?" in page_of(tmp_path / "run").text


def test_long_curves_are_thinned_by_means_and_smoothed_without_lag(tmp_path):
    steps = 2 * MAX_POINTS
    write_metrics(tmp_path / "run", [{"step": i, "loss": float(i)} for i in range(steps)])
    line = page_of(tmp_path / "run").lines("Loss")["next token"]
    assert line["y"] == line["x"]["steps"] == [2 * i + 0.5 for i in range(MAX_POINTS)]
    reach = MAX_POINTS // 60
    np.testing.assert_allclose(line["smooth"][:-reach], line["y"][:-reach])
    assert line["smooth"][-1] == pytest.approx(np.mean(line["y"][-reach - 1 :]))


def test_many_samples_are_spread_from_the_first_to_the_last(tmp_path):
    write_metrics(tmp_path / "run", [row(i, sample=f"sample {i}.") for i in range(1, 101)])
    text = page_of(tmp_path / "run").text
    assert sum(f"sample {i}." in text for i in range(1, 101)) == report.MAX_SAMPLES
    assert "sample 1." in text and "sample 100." in text and "12 of 100, evenly spaced." in text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
keys = st.sampled_from(["tokens", "seconds", "loss", "lr", "heldout_bpb", "expert_load", "sample", "max_violation"])
any_row = st.builds(lambda step, rest: {**rest, "step": step}, st.integers(), st.dictionaries(keys, json_values))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(any_row, max_size=5), tail=st.binary(max_size=20))
def test_any_rows_at_all_make_a_page(rows, tail, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_plotly_js", lambda: "")
    write_metrics(tmp_path / "run", rows)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    data = html.split('type="application/json">')[1].split("</script>")[0]
    json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_without_plotly_the_extra_is_named_and_the_old_report_stays(run_dir, monkeypatch):
    before = write_report(run_dir).read_bytes()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"pip install 'baleen-lm\[report\]'"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before


def test_a_folder_that_is_no_run_is_named_and_stays_empty(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl is missing"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1234567, "1.235M"),
        (0.123456, "0.1235"),
        (True, "yes"),
        (None, "not recorded"),
        (math.nan, "nan"),
        ("1e9", "1e9"),
    ],
)
def test_values_are_shown_as_a_reader_wants_them(value, expected):
    assert shown(value) == expected
