"""Small numerical studies, a minute each: tables of errors, not trainings. `python evidence/studies.py [NAME ...]`

Kept in rows/study-NAME.json with the digest of what they are of, and shown in docs/evidence.md.

Shapes: M, N outer, K summed; T tokens, O outputs, I inputs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from claim import HERE, Notebook
from torch import Tensor

from baleen.data.loader import Loader
from baleen.data.packing import PackedTokens
from baleen.data.prepare import prepare
from baleen.model.fp8 import dequantize_blocks, quantize_blocks
from baleen.model.transformer import Transformer
from baleen.recipe import Recipe, load_recipe
from baleen.train.display import Display
from baleen.train.loop import run_stage
from baleen.train.trainer import Trainer

FRACTION_BITS = 13  # that an H800's tensor core keeps of aligned products and of its sum: 14 with the leading one
AT_ONCE = 32  # products that it adds up in one go (arXiv 2505.09343 §3.1)
PROMOTED = 128
WARM_STEPS = 40

Table = list[dict[str, Any]]


class Study(NamedTuple):
    title: str
    text: str
    run: Callable[[], Table]


def accumulator() -> Table:
    """Errors of sums of E4M3 products, held in 14 bits or promoted to FP32 every 128 products."""
    rows = []
    for kind in ("normal", "uniform in 0..1"):
        for K in (512, 4096):
            generator = torch.Generator().manual_seed(K)
            make = torch.randn if kind == "normal" else torch.rand
            a_MK, b_NK = (_e4m3(make(64, K, generator=generator)) for _ in range(2))
            exact = a_MK.double() @ b_NK.double().t()
            held, promoted = limited_matmul(a_MK, b_NK, K), limited_matmul(a_MK, b_NK, PROMOTED)
            rows.append(
                {"operands": kind, "K": K}
                | {f"14 bits, {of}": error(held, exact) for of, error in ERRORS.items()}
                | {f"promoted, {of}": error(promoted, exact) for of, error in ERRORS.items()}
            )
    return rows


def _largest_error(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).abs().max() / exact.abs().max()).item()


def _rms_error(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


ERRORS = {"largest": _largest_error, "rms": _rms_error}


def limited_matmul(a_MK: Tensor, b_NK: Tensor, promote_every: int) -> Tensor:
    """A Bᵀ in float64, whose sums are kept as a tensor core does and added up in FP32 every so many products.

    Each AT_ONCE products and the sum so far are cut off below FRACTION_BITS behind the largest of them, then added; the
    sum is cut off alike.
    """
    total = torch.zeros(len(a_MK), len(b_NK))
    for first in range(0, a_MK.shape[1], promote_every):
        kept = torch.zeros(len(a_MK), len(b_NK), dtype=torch.float64)
        for start in range(first, min(first + promote_every, a_MK.shape[1]), AT_ONCE):
            stop = min(start + AT_ONCE, first + promote_every)
            products = a_MK[:, None, start:stop].double() * b_NK[None, :, start:stop].double()
            terms = torch.cat((products, kept[..., None]), -1)
            largest = terms.abs().amax(-1, keepdim=True)
            kept = _cut(_cut(terms, largest).sum(-1), None)
        total += kept.float()
    return total.double()


def _cut(x: Tensor, largest: Tensor | None) -> Tensor:
    """x without the bits below FRACTION_BITS behind the leading one of `largest`, or of its own."""
    exponent = torch.frexp(x if largest is None else largest).exponent - 1
    unit = torch.ldexp(torch.ones_like(x), (exponent - FRACTION_BITS).expand_as(x))
    return (x / unit).trunc() * unit


def _e4m3(x: Tensor) -> Tensor:
    """As a whole tile would be quantised, without its scale."""
    return quantize_blocks(x, (1, 128))[0].float()


def gradient_blocks() -> Table:
    """Errors of activation gradients in E4M3 by tiles of 1 x 128 and by blocks of 128 x 128, and what comes of them."""
    rows = []
    for name, gradients_TO, weight_OI in _gradients():
        exact_TI = gradients_TO @ weight_OI
        for block in ((1, 128), (128, 128)):
            rounded = dequantize_blocks(*quantize_blocks(gradients_TO, block), block)
            by_token = (rounded @ weight_OI - exact_TI).norm(dim=1) / exact_TI.norm(dim=1).clamp(min=1e-30)
            rows.append(
                {
                    "gradient of": name,
                    "block": f"{block[0]} x {block[1]}",
                    "numbers lost to 0": ((rounded == 0) & (gradients_TO != 0)).float().mean().item(),
                    "input gradient, rms": _rms_error(rounded @ weight_OI, exact_TI),
                    "of a median token": by_token.median().item(),
                    "of the worst 1 %": by_token.quantile(0.99).item(),
                    "tokens' norms, largest over median": (
                        gradients_TO.norm(dim=1).max() / gradients_TO.norm(dim=1).median()
                    ).item(),
                }
            )
    return rows


def _gradients() -> list[tuple[str, Tensor, Tensor]]:
    """(layer, gradient of its output [T, O], its weight [O, I]) of a hidden-512 model after WARM_STEPS steps."""
    wide = ["model.hidden_size=512", "model.intermediate_size=1280", "train.tokens=81920", "train.batch_tokens=1024"]
    recipe = load_recipe(HERE / "base.toml", [*wide, "train.precision=fp32"])
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = _trainer_of(recipe, Path(folder))
        for _ in range(WARM_STEPS):
            trainer.step()
        layers = trainer.model.trunk_layers
        first, last = layers[0], layers[-1]
        watched = {
            "first layer's down_proj": first.mlp.down_proj, "first layer's o_proj": first.self_attn.o_proj,
            "last layer's o_proj": last.self_attn.o_proj, "last layer's kv_b_proj": last.self_attn.kv_b_proj,
        }  # fmt: skip
        seen: dict[str, Tensor] = {}
        for name, module in watched.items():
            module.register_full_backward_hook(
                lambda module, _, grads, name=name: seen.__setitem__(name, grads[0].detach().flatten(0, -2).clone())
            )
        trainer.step()
    return [(name, seen[name], module.weight.detach()) for name, module in watched.items()]


def _trainer_of(recipe: Recipe, folder: Path) -> tuple[Trainer, PackedTokens]:
    """A trainer that has not begun, and the text that it reads, which lies in `folder`."""
    prepared = prepare(
        recipe.data, vocab_size=recipe.model.vocab_size, seq_len=recipe.train.seq_len, seed=0, cache_dir=folder
    )
    model = Transformer(recipe.model)
    model.init_weights(0)
    return Trainer(recipe, model, Loader(prepared.train, seed=0)), prepared.train


class _Told(Display):
    """Keeps what it is told to warn of."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def poison() -> Table:
    """What a step does whose batch is noise, and one whose gradient is not finite, beside the steps around them, and
    the losses of the same batches in a run without either."""
    noise = 30
    poisons = {noise: "a batch of random tokens", 45: "a gradient that is not a number"}
    undisturbed = [row["loss"] for row in _steps({})]
    rows = []
    for row in _steps(poisons):
        step = row["step"]
        if step in (29, 30, 31, 35, 40, 44, 45, 46, 50, 60):
            twin = (
                "" if step == noise else undisturbed[step - 1 - (step > noise)]
            )  # the noise put the text off by a step
            rows.append(row | {"the same batch without poison": twin})
    return rows


def _steps(poisons: dict[int, str]) -> Table:
    """Sixty steps of the base recipe, those named poisoned."""
    recipe = load_recipe(HERE / "base.toml", ["train.tokens=61440", "train.batch_tokens=1024", "train.precision=fp32"])
    display, rows = _Told(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer, packed = _trainer_of(recipe, Path(folder))
        model = trainer.model
        for step in range(1, 61):
            text, weights, told = trainer.loader, _norm(model), len(display.warnings)
            what, hook = poisons.get(step, "text"), None
            if "random" in what:
                trainer.loader = Loader(_noise(packed), seed=0)
            elif "not a number" in what:
                hook = model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
            result = trainer.step()
            display.warn_if_left_out(step, result.grad_norm)
            trainer.loader = text
            if hook is not None:
                hook.remove()
            norm = result.grad_norm if math.isfinite(result.grad_norm) else None
            rows.append(
                {
                    "step": step, "batch": what, "loss": result.loss, "gradient's norm": norm,
                    "weights moved": _norm(model) != weights, "skipped so far": trainer.counters.skipped,
                    "told": len(display.warnings) > told,
                }
            )  # fmt: skip
    return rows


def _noise(text: PackedTokens) -> PackedTokens:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, int(text.flat_tokens.max()), (len(text.flat_tokens),), generator=generator)
    return PackedTokens(text.seq_len, tokens.numpy().astype("int32"), text.flat_document_ids)


def _norm(model: Transformer) -> float:
    return sum(p.detach().double().square().sum().item() for p in model.parameters())


STUDIES = {
    "accumulator": Study(
        "A 14-bit accumulator",
        "The paper: nearly 2 % largest relative error at K = 4096, cured by promotion every 128 products (§3.3.2). "
        "Here, in a model of the tensor core (32 products aligned to the largest of them and cut off after 13 fraction "
        "bits, their sum alike), 64 x 64 sums of E4M3 numbers; errors over the largest result, and rms over rms.",
        accumulator,
    ),
    "gradient-blocks": Study(
        "Activation gradients in blocks of 128 x 128",
        "The paper: a 16B model diverges when they are quantised by 128 x 128 blocks, because tokens differ (appendix "
        "B.2). Here, gradients of the outputs of four layers (hidden 512, after 40 steps on conversations), rounded to "
        "E4M3 by 1 x 128 tiles or by blocks, and the gradient of the layer's input that comes of them.",
        gradient_blocks,
    ),
    "poison": Study(
        "A poisoned step",
        "What the guard does: a batch of noise is a step like any other, clipped and not skipped; a gradient that is "
        "not finite changes no weight, is counted and told, and nothing is rolled back. Beside it the losses "
        "of the same batches in a run without either.",
        poison,
    ),
}


def read_study(name: str, study: Study, folder: Path) -> list[str]:
    """Its section of the page."""
    file = folder / "rows" / f"study-{name}.json"
    lines = [f"## {study.title}", "", study.text, ""]
    if not study_is_done(name, folder):
        return [*lines, f"Not run yet as it is now: `python evidence/studies.py {name}`.", ""]
    table: Table = json.loads(file.read_text(encoding="utf-8"))["table"]
    lines += [f"| {' | '.join(table[0])} |", "|" + "---|" * len(table[0])]
    lines += [f"| {' | '.join(_cell(key, value) for key, value in row.items())} |" for row in table]
    return [*lines, "", f"`python evidence/studies.py {name}`", ""]


def studies_done(folder: Path) -> list[dict[str, Any]]:
    """What is kept of each that was run."""
    files = (folder / "rows" / f"study-{name}.json" for name in STUDIES)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float):
        return (
            f"{value:.3f}"
            if key in ("loss", "gradient's norm", "the same batch without poison") or value > 1
            else f"{value:.3%}"
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not finite" if value is None else str(value)


def study_is_done(name: str, folder: Path = HERE) -> bool:
    """With the base recipe, FP8's arithmetic and this file as they are now."""
    file = folder / "rows" / f"study-{name}.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["of"] == _digest()


def run_study(name: str, runs: Path) -> None:
    from row import account_of, thrown_away

    run_dir = runs / f"study-{name}"
    run_dir.mkdir(parents=True, exist_ok=True)
    with run_stage(load_recipe(HERE / "base.toml").cost, run_dir, "pretrain"):
        table = STUDIES[name].run()
    file = HERE / "rows" / f"study-{name}.json"
    notebook = Notebook()
    notebook.supersede(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None)
    notebook.write({"hash": file.stem, "of": _digest(), "table": table, **account_of([run_dir])})
    thrown_away([run_dir])


def _digest() -> str:
    files = (HERE / "base.toml", Path(__file__), Path(inspect.getfile(quantize_blocks)))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


if __name__ == "__main__":
    for study in sys.argv[1:] or STUDIES:
        run_study(study, HERE.parent / "runs" / "evidence")
        print("\n".join(read_study(study, STUDIES[study], HERE)))
