"""Reading a prompt beside transformers and llama.cpp: tokens a second.

    python bench/prefill.py [--config S|M|L] [--tokens 512] [--formats fp32,int8] [--json]

The same weights and the same prompt; all take turns in one process. Before that the logits of the last token are
compared.
"""

from __future__ import annotations

import argparse
import sys

import torch
from contenders import network
from rounds import arguments, check, contenders, in_turns, show, speed, summary


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict:
    model = network(args.config)
    made = contenders(args, model, sequences=1, length=args.tokens)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(model.config.vocab_size, (1, args.tokens), generator=generator).tolist()
    apart = check(made, lambda contender: [contender.prefill(prompts).clone()])
    speeds: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(args.rounds):
        for name in in_turns(list(made), round_):
            speeds[name].append(speed(lambda c=made[name]: c.prefill(prompts), args.tokens))
    return {"config": args.config, "tokens": args.tokens} | summary(made, speeds, apart)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    print(f"prefill, config {args.config}, {args.tokens} tokens", file=sys.stderr)
    show(measure(args), args.json)


if __name__ == "__main__":
    main()
