"""Rollouts beside transformers' generate: tokens a second of the same model, prompts, batch and lengths.

    python bench/rollout.py RUN [--batch 256] [--tokens 24] [--rounds 3] [--json]

RUN: a model that knows the chat template, such as runs/reason. Answers are drawn at temperature 1 and go on past their
end token, so that both draw the same number. The two take turns; medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from contenders import machine
from rounds import in_turns, ratio

from baleen.align.rollout import draw, prompt_of
from baleen.align.tasks import ChainSum, questions
from baleen.infer.engine import Request
from baleen.infer.sampler import SamplingParams
from baleen.interop.load import load, model_path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    import transformers

    model, tokenizer, path = load(arguments.run, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_path(path), dtype=torch.float32).eval()
    # Of one length, so that transformers needs no padding; each asked 16 times, as in a group.
    asked = list(islice(questions([ChainSum(terms=(5, 5))], "train", 0), -(-arguments.batch // 16)))
    prompts = [prompt_of(tokenizer, question, "") for question in asked for _ in range(16)][: arguments.batch]
    count = len(prompts) * arguments.tokens
    with torch.inference_mode():
        ids = torch.tensor(prompts[:1])
        mine, peer = model.logits(model(ids).hidden_BTd), theirs(ids).logits
        if not (mine - peer).norm() <= 0.01 * peer.norm():
            raise SystemExit("transformers computes something else")

    def ours() -> float:
        params = [
            SamplingParams(max_tokens=arguments.tokens, ignore_eos=True, seed=seed, logprobs=0)
            for seed in range(len(prompts))
        ]
        requests = [Request(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
        started = time.perf_counter()
        done = draw(model, requests)
        seconds = time.perf_counter() - started
        assert sum(len(tokens) for tokens, _ in done) == count
        return count / seconds

    def peers() -> float:
        ids = torch.tensor(prompts)
        plainly = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # whatever generation_config.json says
        length = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens}
        started = time.perf_counter()
        with torch.inference_mode():
            out = theirs.generate(ids, do_sample=True, **plainly, attention_mask=torch.ones_like(ids), **length)
        seconds = time.perf_counter() - started
        assert out.shape[1] == ids.shape[1] + arguments.tokens
        return count / seconds

    rates: dict[str, list[float]] = {"baleen": [], "transformers": []}
    for round_ in range(arguments.rounds):
        for name in in_turns(list(rates), round_):
            rates[name].append(ours() if name == "baleen" else peers())
    rows = {n: {"tokens_per_second": statistics.median(runs), "rounds": runs} for n, runs in rates.items()}
    result = {
        "baleen": rows["baleen"],
        "peers": {"transformers": rows["transformers"]},
        "ratios": {"transformers": ratio(rows["baleen"], rows["transformers"])},
        "batch": len(prompts),
        "tokens": arguments.tokens,
        "machine": machine(),
    }
    print(json.dumps(result) if arguments.json else result)


if __name__ == "__main__":
    main()
