"""lm-eval on our engine, without a network: a task of local files, and numbers equal to our own."""

import json

import pytest

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # lm-eval and datasets take seconds to import

CHOICE = """
task: whale
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: song
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{target}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


def test_local_tasks(engine, tmp_path, monkeypatch):
    from baleen.config import UserError
    from baleen.eval.harness import score_by_harness
    from baleen.eval.score import beginning, score_task
    from baleen.eval.tasks import Choice
    from baleen.infer.engine import Request
    from baleen.infer.sampler import SamplingParams

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"prompt": "the whale", "choices": [" sings", " is"], "answer": a} for a in (0, 1, 1)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    greedy = SamplingParams(temperature=0, max_tokens=4, stop=("\n",))
    said = engine.complete([Request(beginning(engine.tokenizer, "the whale"), greedy)])[0].text
    for name, text in (("whale", CHOICE), ("song", WRITE), ("own", WRITE.replace("task: song", "task: own"))):
        target = said if name == "own" else "nothing of the kind"
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data, target=target))
    ours = score_task(engine, [Choice.model_validate(row) for row in rows])
    assert score_by_harness(engine, str(tmp_path / "whale.yaml"))["acc"] == ours["accuracy"]
    assert score_by_harness(engine, str(tmp_path / "song.yaml"))["exact_match"] == 0.0
    assert score_by_harness(engine, str(tmp_path / "own.yaml"))["exact_match"] == 1.0
    with pytest.raises(UserError, match="is missing"):
        score_by_harness(engine, str(tmp_path / "none.yaml"))
