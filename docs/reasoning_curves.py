"""The curves of docs/reasoning.md, drawn from what a run of `baleen reason` left behind, and nothing else.

pip install matplotlib && python docs/reasoning_curves.py runs/reason docs/reasoning.svg
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "baleen", "font.size": 9}

from matplotlib import pyplot as plt  # noqa: E402


def main(run: Path, picture: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rl = [row for row in rows if row["stage"] == "rl"]
    cold = rl[0]["step"] - 1
    figure, (right, length) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    held_out = [
        (row["step"] - cold, row["heldout_accuracy"]) for row in rows if row.get("heldout_accuracy") is not None
    ]
    steps = [row["step"] - cold for row in rl]
    right.plot(*zip(*held_out, strict=True), "o-", ms=3, label="held out, greedy")
    right.plot(steps, [row["accuracy"] for row in rl], lw=1, label="training answers, T = 1")
    if (run / "summary.json").is_file():
        control = json.loads((run / "summary.json").read_text())["accuracy_sft_control"]
        right.axhline(control, ls=":", color="grey", label="control: as long of SFT")
    right.axvline(0, lw=0.5, color="grey")
    right.set(title="Right answers", xlabel="step of RL (before 0: cold start)", xlim=(-200, None), ylim=(0, 1))
    right.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    right.legend(frameon=False, fontsize=8)
    length.plot(steps, [row["answer_tokens"] for row in rl])
    length.set(title="Length of an answer", xlabel="step of RL", ylabel="tokens", ylim=(0, None))
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
