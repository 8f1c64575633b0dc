"""Where each tensor of a released checkpoint lives in our model: the map that every reader and writer goes through.

On disk each expert has its own gate_proj, up_proj and down_proj; in memory a layer's experts are stacked. On disk each
MTP layer repeats the embedding and the output head; in memory it shares them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from baleen.config import ModelConfig
from baleen.cost.architecture import from_model_config
from baleen.cost.flops import mtp_parameters, parameters
from baleen.model.transformer import Transformer

CORRECTION_BIAS = "mlp.gate.e_score_correction_bias"  # float32 in every checkpoint
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights_in(config: ModelConfig) -> int:
    """How many numbers a checkpoint of this shape holds, its MTP layers included.

    Counted, not built: torch cannot even name the shapes that a config.json may lie about.
    """
    arch = from_model_config(config)
    return parameters(arch)["total"] + mtp_parameters(arch)


class Place(NamedTuple):
    """A tensor of ours, or the part of it that one tensor on disk fills."""

    name: str
    expert: int | None = None  # index into the stack
    half: int | None = None  # of that expert's rows: 0 the gate's, 1 the up projection's
    copy: bool = False  # a repetition of a tensor that stands elsewhere on disk too

    def of(self, tensor: Tensor) -> Tensor:
        """A view of this part of the named tensor."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.half is None else tensor.chunk(2)[self.half]


class Layout:
    """The tensors of one model as released checkpoints keep them.

    places: name on disk -> place in the model, for every tensor, layer by layer; tied models have no lm_head.weight.
    stacks: name of an expert stack -> the names it stands for; transformers 5 keeps stacks in memory.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        with torch.device("meta"):
            self._tensors = Transformer(config).state_dict()
        self.places: dict[str, Place] = {}
        self.stacks: dict[str, list[str]] = {}
        for name in self._tensors:
            if name.endswith("experts.gate_up_proj"):
                self._add_experts(name, {"gate_proj": 0, "up_proj": 1})
            elif name.endswith("experts.down_proj"):
                self._add_experts(name, {"down_proj": None})
            elif name != HEAD or not config.tie_word_embeddings:
                self.places[name] = Place(name)
        self.head = EMBEDDING if config.tie_word_embeddings else HEAD
        for layer in range(config.num_hidden_layers, config.num_layers_with_mtp):
            self.places[f"model.layers.{layer}.embed_tokens.weight"] = Place(EMBEDDING, copy=True)
            self.places[f"model.layers.{layer}.shared_head.head.weight"] = Place(self.head, copy=True)

    def _add_experts(self, stack: str, halves: dict[str, int | None]) -> None:
        prefix = stack.rpartition(".")[0]
        self.stacks[stack] = []
        for expert in range(self.config.n_routed_experts):
            for projection, half in halves.items():
                name = f"{prefix}.{expert}.{projection}.weight"
                self.places[name] = Place(stack, expert, half)
                self.stacks[stack].append(name)

    def originals(self) -> list[str]:
        """Every name but those of copies."""
        return [name for name, place in self.places.items() if not place.copy]

    def copies(self, name: str) -> list[str]:
        """The names that repeat this tensor."""
        return [other for other, place in self.places.items() if place.copy and place.name == name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk of a tensor or of a stack of experts."""
        place = self.places.get(name, Place(name))
        return tuple(place.of(self._tensors[place.name]).shape)
