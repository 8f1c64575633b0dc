"""What packing weights in fewer bits costs a trained model: bits per byte of its held-out text, by the native kernels.

    python bench/formats.py RUN [--json]

First the model itself in PyTorch, then every format through the native runner.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from trained import trained

from baleen.eval.bits_per_byte import bits_per_byte
from baleen.infer.native.runner import NativeRunner, fastest_runner
from baleen.infer.native.weights import FORMATS, Format
from baleen.model.cache import Batch, LatentPages
from baleen.model.transformer import Transformer

PAGE = 16


class Hidden(NamedTuple):
    hidden_BTd: Tensor


class Packed:
    """A packed model that reads whole windows, as `bits_per_byte` asks its model to."""

    def __init__(self, model: Transformer, format: Format):
        self.device = model.device
        self._pages = LatentPages(model.config, -(-model.config.max_position_embeddings // PAGE), page_size=PAGE)
        runner = fastest_runner(model, self._pages, format)
        assert isinstance(runner, NativeRunner)
        self._runner = runner

    @property
    def megabytes(self) -> float:
        return self._runner.packed_bytes / 1e6

    def __call__(self, ids_BT: Tensor) -> Hidden:
        B, T = ids_BT.shape
        each = -(-T // PAGE)
        hidden = []
        for ids in ids_BT.tolist():
            batch = Batch(ids, [0], [T], [range(each)])
            hidden.append(self._runner.forward(batch).hidden_Nd)
        return Hidden(torch.stack(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        return self._runner.logits(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    run = trained(args.run)
    model = run.model.float()

    def score(reader) -> float:
        found = bits_per_byte(reader, run.tokenizer, run.heldout, window=run.seq_len)
        return found["bits_per_byte"]

    rows = {"pytorch": {"bits_per_byte": score(model)}}
    for format in FORMATS:
        packed = Packed(model, format)
        rows[format] = {"bits_per_byte": score(packed), "megabytes": packed.megabytes}
    if args.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        loss = row["bits_per_byte"] - rows["pytorch"]["bits_per_byte"]
        print(f"{name:8} {row['bits_per_byte']:.4f} bits per byte ({loss:+.4f})  {row.get('megabytes', 0):6.1f} MB")


if __name__ == "__main__":
    main()
