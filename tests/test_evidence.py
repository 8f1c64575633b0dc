"""The notebook: claims are runnable, rows are those of the recipe as it is, and the pages are made of them."""

import json
import math
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from baleen.config import UserError

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "evidence"

CLAIM = """
says = "s"
paper = "p"
seeds = [0, 1]
{keys}
[arms]
plain = []
new = ["train.weight_decay=0.2"]
"""
SWEEP = """
says = "rates"
paper = "p"
expects = "least"
seeds = [0]
overrides = ["train.eps=1e-9"]
[arms]
low = ["train.lr=1e-3"]
high = ["train.lr=2e-3"]
beyond = ["train.lr=4e-3"]
"""


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    import claim
    import notebook
    import page

    return claim, notebook, page


@pytest.fixture
def make(modules, tmp_path):
    """A notebook of one claim `c`, tuned by a sweep that is done: high is better."""

    def made(keys="", tuned=True):
        (tmp_path / "claims").mkdir(exist_ok=True)
        (tmp_path / "base.toml").write_text((EVIDENCE / "base.toml").read_text())
        (tmp_path / "claims" / "c.toml").write_text(CLAIM.format(keys=keys))
        (tmp_path / "claims" / "lr-sparse.toml").write_text(SWEEP)
        notebook = modules[0].Notebook(tmp_path)
        if tuned:
            fill(notebook, "lr-sparse", {("low", 0): 2.0, ("high", 0): 1.0, ("beyond", 0): 3.0})
        return notebook

    return made


def fill(notebook, name, values):
    for (arm, seed), value in values.items():
        measured = {"heldout_bpb": value, "largest_jump": value / 10, "longest_spike": 0, "skipped": 0}
        row = {"hash": notebook.hash_of(name, arm, seed), "claim": name, "arm": arm, "seed": seed}
        notebook.write(row | {"measured": measured, "device_hours": 0.5, "usd": 0.01, "machine": "m", "date": "d"})


def test_every_claim_has_arms_that_differ(modules):
    notebook = modules[0].Notebook()
    sweep = notebook.claims[modules[0].SWEEP]
    notebook.best_arm = lambda name: list(notebook.claims[name].arms)[1]  # as if all sweeps were done
    assert sweep.expects == "least"
    for name, claim in notebook.claims.items():
        rows = [(arm, seed) for arm in claim.arms for seed in claim.seeds]
        assert len({notebook.hash_of(name, *row) for row in rows}) == len(rows)
        assert claim.expects == "least" or len(claim.seeds) >= 3
        assert set(claim.key_value_heads) | set(claim.tuned_by) <= set(claim.arms)
    assert [claim.quick for claim in notebook.claims.values()].count(True) == 1


def test_the_pages_are_those_of_the_rows(modules):
    _, _, page = modules
    notebook = modules[0].Notebook()
    assert (ROOT / "docs/evidence.md").read_text() == page.page(notebook)
    assert (readme := (ROOT / "README.md").read_text()) == page.with_summary(readme, notebook)
    plots = {file.stem: file.read_text() for file in (ROOT / "docs/evidence").glob("*.svg")}
    assert plots == page.drawn(notebook)


def test_every_row_belongs_to_a_claim(modules):
    known = {row["hash"] for row in modules[0].Notebook().all_rows()}
    files = {file.stem for file in (EVIDENCE / "rows").glob("*.json")}
    assert {stem for stem in files if not stem.startswith("study-")} - {"times"} == known


def test_every_row_took_no_more_than_half_a_device_hour(modules):
    assert all(row["device_hours"] <= 0.5 for row in modules[0].Notebook().all_rows())  # 15 minutes of two cores


def test_interval_is_students(modules):
    mean, half = modules[0].interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert modules[0].interval([1.0]) == (1.0, math.inf)


@pytest.mark.parametrize(
    ("expects", "mean", "half", "says"),
    [
        ("lower", -2.0, 1.0, "holds"),
        ("lower", 2.0, 1.0, "does not hold"),
        ("lower", -1.0, 2.0, "can't be seen at this size"),
        ("higher", 2.0, 1.0, "holds"),
        ("higher", -2.0, 1.0, "does not hold"),
        ("within", 0.5, 0.4, "holds"),
        ("within", -2.0, 0.5, "holds"),  # better is no worse
        ("within", 2.0, 0.5, "does not hold"),
        ("within", 0.5, 0.6, "can't be seen at this size"),
    ],
)
def test_verdicts(modules, make, expects, mean, half, says):
    claim = make(f'expects = "{expects}"\nmargin = 1.0').claims["c"]
    assert modules[0].judged(claim, mean, half) == says


def test_a_claim_waits_for_its_sweep(modules, make, tmp_path):
    notebook = make(tuned=False)
    assert notebook.recipe("c", "new", 0) is None and notebook.rows("c") == []
    with pytest.raises(UserError, match="run lr-sparse first"):
        modules[1].run_row(notebook, "c", "new", 0, tmp_path)
    recipe = make().recipe("c", "new", 0)
    assert recipe is not None and (recipe.train.lr, recipe.train.weight_decay) == (2e-3, 0.2)


def test_stale_rows_do_not_count(make):
    fill(notebook := make(), "c", {(arm, seed): 1.0 for arm in ("plain", "new") for seed in (0, 1)})
    assert notebook.complete("c") and len(notebook.rows("c")) == 4
    assert make("notes = 'other words'").complete("c")
    assert make('overrides = ["train.tokens=4096"]').rows("c") == []
    assert len(make("[key_value_heads]\nnew = 2\n").rows("c")) == 2


def test_a_best_rate_at_the_edge_is_not_taken_and_said_at_once(modules, make, tmp_path, monkeypatch):
    """Nothing that it tunes is run; what does not hang on it, the page, can still be written."""
    fill(notebook := make(), "c", {(arm, seed): 1.0 for arm in ("plain", "new") for seed in (0, 1)})
    fill(notebook, "lr-sparse", {("low", 0): 0.5})  # another rate is the best now, with nothing tried beyond it
    notebook = make(tuned=False)
    assert notebook.rows("c") == [] and notebook.verdict("lr-sparse") == "low, at the edge: not taken"
    with pytest.raises(UserError, match="the best is low, at the edge"):
        modules[1].run_row(notebook, "c", "new", 0, tmp_path)
    monkeypatch.setattr(modules[1], "run_row", lambda *_: pytest.fail("run before the sweep is settled"))
    with pytest.raises(UserError, match="the best is low, at the edge"):
        modules[1].run_missing(notebook, ["c", "lr-sparse"], tmp_path)


def test_an_incomplete_claim_has_no_number(modules, make):
    _, _, page = modules
    notebook = make('not_run = "too long"')
    assert "| s |  | too long |" in page.summary(notebook)
    fill(notebook, "c", {("plain", 0): 1.0, ("new", 0): 0.5, ("plain", 1): 1.0})
    assert "| s |  | 3 of 4 rows are there |" in page.summary(notebook)
    fill(notebook, "c", {("plain", 1): 2.0, ("new", 1): 1.0})
    assert "| s | heldout_bpb -50.00% ± 0.00% | holds |" in page.summary(notebook)
    text = page.page_of_claims(notebook)
    assert "| new | -50.00% ± 0.00% | 0.7500 ± 3.1765 |" in text
    shares = make("absolute = true")
    assert "| s | heldout_bpb -75.0 ± 317.6 points |" in page.summary(shares)
    assert page.drawn(notebook)["c"].count("<circle") == 1
    assert page.with_summary(f"a{page.BEGIN}old{page.END}b", notebook).startswith(f"a{page.BEGIN}\n| Claim")


def test_only_what_is_missing_is_run_and_sweeps_come_first(modules, make, tmp_path, monkeypatch):
    notebook, ran = make(tuned=False), []

    def run(notebook, name, arm, seed, runs):
        ran.append((arm, seed))
        if len(ran) == 5:
            raise KeyboardInterrupt
        fill(notebook, name, {(arm, seed): 1.0 if arm == "high" else 2.0})
        return notebook.row(name, arm, seed)

    monkeypatch.setattr(modules[1], "run_row", run)
    with pytest.raises(KeyboardInterrupt):
        modules[1].run_missing(notebook, ["c", "lr-sparse"], tmp_path)
    modules[1].run_missing(notebook, ["c", "lr-sparse"], tmp_path)
    sweep = [("low", 0), ("high", 0), ("beyond", 0)]
    assert ran == [*sweep, ("plain", 0), ("new", 0), ("new", 0), ("plain", 1), ("new", 1)]
    assert notebook.complete("c")


@pytest.mark.parametrize(("again", "said"), [(1.02, ("within", "OUTSIDE")), (1.2, ("OUTSIDE", "OUTSIDE"))])
def test_two_rows_again(modules, make, tmp_path, monkeypatch, capsys, again, said):
    """Each within the interval of one value more of its arm."""
    notebook = make("quick = true")
    with pytest.raises(UserError, match="no rows to compare with"):
        modules[1].run_again(notebook, tmp_path)
    fill(notebook, "c", {("plain", 0): 1.0, ("new", 0): 0.5, ("plain", 1): 1.01, ("new", 1): 0.51})
    monkeypatch.setattr(modules[1], "run_row", lambda *_: {"measured": {"heldout_bpb": again}})
    assert not modules[1].run_again(notebook, tmp_path)
    assert tuple(line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()) == said


def test_what_no_claim_asks_for_is_taken_away_and_its_cost_kept(modules, make, monkeypatch):
    claim, notebook_module, page = modules
    notebook = make()
    fill(notebook, "c", {(arm, seed): 1.0 for arm in ("plain", "new") for seed in (0, 1)})
    assert notebook.stale() == []
    notebook = make('overrides = ["train.eps=1e-7"]')
    assert len(notebook.stale()) == 4
    monkeypatch.setattr(notebook_module, "Notebook", lambda: notebook)
    monkeypatch.setattr(notebook_module, "write_pages", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["notebook.py", "--retire"])
    notebook_module.main()
    assert notebook.stale() == [] and len(list((notebook.folder / "rows").glob("*.json"))) == 3  # the sweep's
    assert notebook.superseded() == {"rows": 4, "device_hours": 2.0, "usd": 0.04}
    told = "\n".join(page._account(notebook))
    assert "| this notebook | 3 | 1.50 | 0.030 |" in told and "| what it has replaced | 4 | 2.00 | 0.040 |" in told
    assert f"So {3.5 / (3.5 + page.DEMO):.1%} of that is research" in told
    with pytest.raises(UserError, match="tuned by a sweep that is not done"):
        (notebook.folder / "rows" / f"{notebook.hash_of('lr-sparse', 'low', 0)}.json").unlink()
        notebook.stale()


def test_a_spike_or_a_skipped_step_is_in_the_summary(modules, make):
    _, _, page = modules
    notebook = make()
    assert "spikes in 0 of 3 rows, 0 steps skipped | none seen |" in page.summary(notebook)
    file = notebook.folder / "rows" / f"{notebook.hash_of('lr-sparse', 'low', 0)}.json"
    for key, value in (("skipped", 1), ("longest_spike", page.STEPS_OF_A_SPIKE)):
        row = json.loads(file.read_text())
        row["measured"] |= {"skipped": 0, "longest_spike": 0, key: value}
        file.write_text(json.dumps(row))
        assert "skipped | does not hold |" in page.summary(notebook)


@pytest.mark.parametrize(("sparse", "pays"), [(0.8, "yes"), (0.99, "no"), (0.94, "can't be seen at this size")])
def test_what_four_sizes_say_of_time(modules, make, sparse, pays):
    """Losses of an exact power law; a sparse step takes twice the seconds, in which a dense network of twice the size
    would be 2^0.1 times better."""
    import sizes

    folder = make().folder
    for number, name in enumerate(sizes.SIZES):
        keys = f'says = "s"\npaper = "p"\ntimed = true\noverrides = ["train.eps=1e-{10 + number}"]\n'
        arms = "[arms]\ndense = []\nsparse = ['train.lr=1e-9']\n"
        (folder / "claims" / f"{name}.toml").write_text(keys + arms)
    notebook, seconds = modules[0].Notebook(folder), {}
    for number, name in enumerate(sizes.SIZES):
        active = 1e6 * 2**number
        for arm, factor, slower in (("dense", 1.0, 1), ("sparse", sparse, 2)):
            for seed in (0, 1, 2):
                jitter = 1 + (0.01 * (seed - 1) if arm == "sparse" else 0.0)
                fill(notebook, name, {(arm, seed): factor * jitter * 8 * active**-0.1})
                file = notebook.folder / "rows" / f"{notebook.hash_of(name, arm, seed)}.json"
                row = json.loads(file.read_text())
                row["measured"]["active_parameters"] = active
                file.write_text(json.dumps(row))
            seconds[notebook.hash_of(name, arm, 0)] = [slower * active * 1e-6] * 3
    assert "Not timed yet" in "\n".join(sizes.page_of_sizes(notebook))
    notebook.write({"hash": "times", "seconds": seconds})
    told = "\n".join(sizes.page_of_sizes(notebook))
    assert "| dense | -0.1000 ± 0.0000 | 0.00% |" in told
    assert told.count(f"| {sparse - 1:+.2%} ± ") == 4 and told.count("| 2.00 × |") == 4
    in_time = f"| {sparse * 2**0.1 - 1:+.2%} ± "
    assert told.count(in_time) == 4 and told.count(f"| {pays} |") == 4
    assert ("at none of the four sizes" in told) is (pays != "yes")


def test_pages_without_a_row(modules, make):
    _, _, page = modules
    notebook = make(tuned=False)
    notebook.write({"hash": "times", "seconds": {}, "device_hours": 0.1, "usd": 0.0, "machine": "m", "date": "d"})
    assert "| this notebook | 1 | 0.10 | 0.000 |" in page.page(notebook)


def test_jumps_are_over_the_median_before(modules):
    from measures import largest_jump, longest_spike

    assert largest_jump([3.0] * 20 + [None, 3.5] + [2.0] * 5) == 0.5
    assert largest_jump([3.0, 9.0]) == 0.0
    assert longest_spike([3.0] * 20 + [3.4, 9.0, 3.6, 3.5, 9.0] + [3.0] * 5) == 2
    assert longest_spike([3.0] * 20 + [4.0] * 30) == 30  # until it ends, though the median before it rises


def test_needles_are_asked_for_once_each(modules):
    from needles import KINDS, TIMES, questions_of, with_needles

    for lines, times in ((200, 1), (50, TIMES)):  # in short documents each stands several times
        talk = "a line of talk\n" * lines
        text = with_needles(talk, random.Random(1))
        asked = questions_of(text)
        assert len(asked) == len(KINDS) and abs(len(text) - len(talk)) < 100
        for start, end, depth in asked:
            kind, word = text[text.rindex("\n", 0, start) + 1 : end].split()
            assert word in KINDS[kind] and text.count(f"{kind} {word}\n") == times + 1
            assert depth == text.index(f"{kind} {word}\n") / text.index("Again:\n")


def test_a_model_is_asked_at_the_word_that_answers(modules, monkeypatch):
    import context
    import torch
    from needles import questions_of, with_needles

    text = with_needles("a line of talk\n" * 50, random.Random(1))
    last = questions_of(text)[-1]

    class Reads:
        """Its likeliest token is the one that comes, but for the places where it errs."""

        def __init__(self, errs=(), room=10_000):
            self.config, self.device, self.errs = SimpleNamespace(max_position_embeddings=room), "cpu", list(errs)

        def __call__(self, ids_1T):
            coming = ids_1T[0].roll(-1)
            coming[[place - 1 for place in self.errs]] = 0
            return SimpleNamespace(hidden_BTd=torch.nn.functional.one_hot(coming, 128)[None])

        def logits(self, hidden_Td):
            return hidden_Td

    letters = SimpleNamespace(bos_id=None, encode=lambda words: list(words.encode()))
    monkeypatch.setattr(context, "token_nats", lambda model, texts: [torch.zeros(len(texts[0]))])
    everything = [(depth, True) for _, _, depth in questions_of(text)]
    assert context._asked(Reads(), letters, text)[0] == everything
    assert context._asked(Reads([last[1] - 1]), letters, text)[0] == [*everything[:-1], (last[2], False)]
    assert context._asked(Reads([last[0] - 1]), letters, text)[0] == everything  # the kind is not what is asked for
    assert context._asked(Reads(room=last[1] - 1), letters, text)[0] == everything[:-1]


def test_a_limited_accumulator_loses_what_promotion_keeps(modules):
    """On sums of positive numbers, where each addition to a large sum cuts off the small one."""
    import torch
    from studies import limited_matmul

    a_MK = torch.rand(2, 1024, generator=torch.Generator().manual_seed(0))
    exact = a_MK.double() @ a_MK.double().t()
    held, promoted = ((limited_matmul(a_MK, a_MK, n) / exact - 1).abs().max().item() for n in (1024, 128))
    assert held > 4 * promoted > 0
    assert limited_matmul(torch.ones(1, 256), torch.ones(1, 256), 256).item() == 256.0


def test_shared_heads_are_plain_attention(modules):
    """As many key heads as heads, each twice: GQA is MHA with equal keys."""
    import torch
    from attention import use_shared_heads

    from baleen.model.transformer import Transformer
    from baleen.recipe import load_recipe

    config = load_recipe(
        EVIDENCE / "base.toml",
        ["model.qk_rope_head_dim=32", "model.num_attention_heads=4", "model.num_hidden_layers=1"],
    ).model
    models = []
    for heads in (2, 4):
        torch.manual_seed(0)
        model = Transformer(config)
        use_shared_heads(model, heads)
        model.init_weights(0)
        models.append(model)
    two, four = (model.model.layers[0].self_attn for model in models)
    shared = {k: v for k, v in models[0].state_dict().items() if not k.endswith(("k_proj.weight", "v_proj.weight"))}
    models[1].load_state_dict(shared, strict=False)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            weight = getattr(two, name).weight.unflatten(0, (2, -1))
            getattr(four, name).weight.copy_(weight.repeat_interleave(2, 0).flatten(0, 1))
    ids = torch.arange(40)[None]
    a, b = (model(ids).hidden_BTd for model in models)
    assert torch.allclose(a, b, atol=1e-5)
    changed = ids.clone()
    changed[0, 20] += 1
    assert torch.equal(models[0](changed).hidden_BTd[:, :20], a[:, :20])  # causal


def a_corpus(folder):
    rng = random.Random(0)
    folder.mkdir()
    for number in range(30):
        words = rng.choices(["whale", "krill", "ocean", "sieve", "song", "deep"], k=90)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


SMALL = [
    "model.vocab_size=300", "model.hidden_size=32", "model.num_hidden_layers=2", "train.tokens=768",
    "train.batch_tokens=128", "train.seq_len=32", "train.checkpoint_every=2", "data.heldout_fraction=0.2",
]  # fmt: skip


def test_seconds_are_those_of_the_arms_in_turns(modules, make, tmp_path, monkeypatch):
    import times

    from baleen.train.trainer import Trainer

    monkeypatch.setattr(times, "WARM", 1)
    monkeypatch.setattr(times, "ROUNDS", 2)
    monkeypatch.setattr(times, "STEPS", 2)
    taken, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: taken.append(self.recipe.train.weight_decay) or step(self))
    keys = [*SMALL, "data.format=text", f"data.sources=['{a_corpus(tmp_path / 'corpus')}']"]
    notebook = make(f"timed = true\noverrides = {json.dumps(keys)}")
    assert notebook.run_seconds("c") is None
    times.time_arms(notebook, tmp_path / "runs")
    assert taken == [0.2, 0.1] + [0.1, 0.1, 0.2, 0.2] + [0.2, 0.2, 0.1, 0.1]  # another one first in each turn
    kept = json.loads((notebook.folder / "rows" / "times.json").read_text())
    by_arm = {arm: kept["seconds"][notebook.hash_of("c", arm, 0)] for arm in ("plain", "new")}
    assert notebook.run_seconds("c") == {arm: [6 * turn for turn in turns] for arm, turns in by_arm.items()}
    assert all(len(turns) == 2 for turns in by_arm.values())
    assert kept["device_hours"] > 0
    times.time_arms(notebook, tmp_path / "runs")
    again, gone = json.loads((notebook.folder / "rows" / "times.json").read_text()), notebook.superseded()
    assert gone["rows"] == 1 and gone["device_hours"] == pytest.approx(kept["device_hours"], abs=1e-6)
    assert again["device_hours"] > 0 and not (tmp_path / "runs" / "times").exists()  # or it would count both sittings
    assert make(f"timed = true\noverrides = {json.dumps([*keys, 'train.eps=1e-7'])}").run_seconds("c") is None


def test_a_row_that_was_stopped_measures_what_an_undisturbed_one_does(modules, tmp_path, monkeypatch):
    import row

    from baleen.recipe import load_recipe
    from baleen.train.rundir import Metrics

    corpus, write = a_corpus(tmp_path / "corpus"), Metrics.write
    recipe = load_recipe(EVIDENCE / "base.toml", SMALL, [str(corpus)])
    monkeypatch.setattr(row, "LAST", 2)

    def train(name, stop=0):
        def write_and_stop(self, told):
            write(self, told)
            if told["step"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Metrics, "write", write_and_stop)
        return row.train_row(recipe, tmp_path / name, None, cache=tmp_path / "data")

    for step in (1, 5):  # of six, of which the last two are averaged
        with pytest.raises(KeyboardInterrupt):
            train("stopped", stop=step)
    assert train("stopped") == train("straight")


def test_rows_are_written_as_json(make):
    fill(notebook := make(), "c", {("plain", 0): 1.0})
    file = notebook.folder / "rows" / f"{notebook.hash_of('c', 'plain', 0)}.json"
    assert json.loads(file.read_text())["measured"]["heldout_bpb"] == 1.0
