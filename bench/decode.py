"""Decoding beside transformers and llama.cpp: tokens a second, of one sequence or of several at once.

    python bench/decode.py [--config S|M|L] [--batch 1] [--formats fp32,int8] [--json]

The same weights and the same tokens, which do not repeat; all take turns in one process. Before that the logits of a
prompt and of a few steps are compared.
"""

from __future__ import annotations

import argparse
import sys

import torch
from contenders import Contender, network
from rounds import arguments, check, contenders, in_turns, show, speed, summary

PROMPT = 128  # tokens before the first step


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict:
    model = network(args.config)
    made = contenders(args, model, sequences=args.batch, length=PROMPT + args.steps)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(model.config.vocab_size, (args.batch, PROMPT), generator=generator).tolist()
    stream = torch.randint(model.config.vocab_size, (args.steps, args.batch), generator=generator).tolist()

    def begin(contender: Contender) -> list[torch.Tensor]:
        return [contender.prefill(prompts).clone(), *(contender.step(tokens).clone() for tokens in stream[:15])]

    apart = check(made, begin)
    speeds: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(args.rounds):
        for name in in_turns(list(made), round_):
            contender = made[name]

            def steps(contender: Contender = contender) -> None:
                for tokens in stream:
                    contender.step(tokens).argmax(-1).tolist()

            speeds[name].append(speed(steps, args.batch * args.steps, before=lambda c=contender: c.prefill(prompts)))
    return {"config": args.config, "batch": args.batch} | summary(made, speeds, apart)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    print(f"decode, config {args.config}, batch {args.batch}", file=sys.stderr)
    show(measure(args), args.json)


if __name__ == "__main__":
    main()
