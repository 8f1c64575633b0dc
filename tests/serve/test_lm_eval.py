"""lm-eval's local-completions scores a small task over the API as the engine itself does."""

import json
import subprocess
import sys

import pytest

from baleen.infer.engine import Request
from baleen.infer.sampler import SamplingParams

pytest.importorskip("lm_eval", reason="lm-eval comes with the extra `eval`")

QUESTIONS = [
    {"question": f"the {a} sat on a", "choices": [" mat", " dog", " bird café"], "answer": i % 3}
    for i, a in enumerate(("cat", "dog", "bird", "hill", "naïve cat", "far away dog", "mat", "hills"))
]
TASK = """
task: whale
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
def test_local_completions(tiny, tokenizer, tmp_path):
    (tmp_path / "whale.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "whale.yaml").write_text(TASK.replace("DATA", str(tmp_path / "whale.jsonl")))
    tokenizer.save(tmp_path / "tokenizer")
    arguments = {
        "model": "tiny", "base_url": f"{tiny.url}/v1/completions", "tokenizer": tmp_path / "tokenizer",
        "tokenizer_backend": "huggingface", "num_concurrent": 4, "max_length": 512,
    }  # fmt: skip
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "whale"]
    command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()), "--include_path", tmp_path]
    command += ["--output_path", tmp_path / "out", "--log_samples"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = next((tmp_path / "out").rglob("samples_whale_*.jsonl")).read_text().splitlines()
    assert len(samples) == len(QUESTIONS)
    engine = tiny.service.models.get("other").engine  # the same weights, and idle
    for sample in map(json.loads, samples):
        question = sample["doc"]
        for choice, response in zip(question["choices"], sample["filtered_resps"], strict=True):
            whole = tokenizer.encode(question["question"] + choice)
            first = len(tokenizer.encode(question["question"]))
            params = SamplingParams(max_tokens=0, prompt_logprobs=0)
            scores = engine.complete([Request(whole, params)])[0].prompt_logprobs
            assert float(response[0]) == pytest.approx(sum(s.logprob for s in scores[first - 1 :]), abs=1e-3)
