"""The models that a server offers, each with what it can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baleen.config import UserError
from baleen.cost.architecture import from_model_config
from baleen.cost.flops import active_parameters, parameters
from baleen.data.tokenizer import Tokenizer
from baleen.infer.chat import CHAT_PARAMS, params_of
from baleen.infer.engine import Engine
from baleen.infer.parse import THINK, ToolMarkers
from baleen.infer.sampler import SamplingParams
from baleen.interop.load import Loaded, load
from baleen.recipe import recipe_sections, run_of
from baleen.serve.answers import ModelCard
from baleen.serve.constrain import Constrainer
from baleen.serve.errors import ApiError, BadRequest
from baleen.serve.limits import Limits

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens")


@dataclass
class Served:
    """One model under its name. `run_dir`: where its run lives, None for a model that is not a run of ours.
    `chat_params`, `system`: what a conversation takes for what a request leaves out."""

    name: str
    engine: Engine
    run_dir: Path | None = None
    chat_params: SamplingParams = CHAT_PARAMS
    system: str = ""  # the message that a run was trained to be asked under
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.markers = ToolMarkers.of(self.tokenizer)
        self.constrainer = Constrainer(self.tokenizer, self.engine.model.config.vocab_size)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def check_prompt(self, ids: Sequence[int], param: str, limits: Limits) -> None:
        """Raises BadRequest for a prompt that leaves no room, or is none of this model's."""
        room = min(self.engine.context - 1, limits.prompt_tokens or self.engine.context)
        if len(ids) > room:
            raise BadRequest(
                f"the prompt has {len(ids)} tokens: this model takes up to {room}, with room for an answer in a "
                f"context of {self.engine.context}",
                param=param,
                code="context_length_exceeded",
            )
        if not ids:
            raise BadRequest("the prompt is empty", param=param, code="invalid_value")
        size = self.engine.model.config.vocab_size
        if max(ids) >= size:
            raise BadRequest(f"token {max(ids)} is outside the vocabulary of {size}", param=param, code="invalid_value")

    @property
    def card(self) -> ModelCard:
        config = self.engine.model.config
        arch = from_model_config(config)
        return ModelCard(
            id=self.name,
            object="model",
            created=self.created,
            owned_by="baleen",
            max_model_len=self.engine.context,
            baleen=self._abilities()
            | {
                "layers": max(0, config.num_hidden_layers - config.first_k_dense_replace),
                "first_moe_layer": config.first_k_dense_replace,
                "experts": config.n_routed_experts,
                "experts_per_token": config.num_experts_per_tok,
                "mtp_layers": config.num_nextn_predict_layers,
                "parameters": parameters(arch)["total"],
                "active_parameters": active_parameters(arch),
                "sampling": {name: getattr(self.chat_params, name) for name in SAMPLING},
                "system": self.system,
            },
        )

    def _abilities(self) -> dict[str, Any]:
        return {
            "chat": self.tokenizer.template is not None,
            "thinking": self.tokenizer.id_of(THINK) is not None,
            "tools": self.markers is not None,
        }


class Models:
    """By name; the first is the default of the page's picker. Raises UserError where two share a name."""

    def __init__(self, served: Sequence[Served]):
        self._by_name = {model.name: model for model in served}
        if len(self._by_name) < len(served):
            names = ", ".join(model.name for model in served)
            raise UserError(f"two models would have the same name ({names}): rename a run's directory")

    def __iter__(self):
        return iter(self._by_name.values())

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    @property
    def engines(self) -> dict[str, Engine]:
        return {name: model.engine for name, model in self._by_name.items()}

    def get(self, name: str) -> Served:
        if name not in self._by_name:
            message = f"there is no model {name[:100]!a}: take one of {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._by_name[name]


def load_models(runs: Sequence[str], make_engine: Callable[[Loaded], Engine]) -> Models:
    """RUN arguments as `baleen chat` takes them: run directories, model directories, GGUF files, `smollm2`."""
    served = []
    for run in runs:
        loaded = load(run)
        system = recipe_sections(Path(run)).get("system", "")
        served.append(Served(name_of(run), make_engine(loaded), run_of(Path(run)), params_of(loaded.path), system))
    return Models(served)


def name_of(run: str) -> str:
    """The directory's or file's own name; of runs/NAME/model the run's."""
    path = Path(run).absolute()
    owner = run_of(path)
    if owner is not None:
        return f"{owner.name}-ema" if path.name == "model-ema" else owner.name
    return path.stem if path.suffix == ".gguf" else path.name
