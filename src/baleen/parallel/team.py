"""Workers that train one model together: data and expert parallel (Team), with a pipeline besides (PipelineTeam)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from baleen.config import ModelConfig
from baleen.model.initial import fill, initial
from baleen.model.moe import DeepseekMoE, Gate
from baleen.model.transformer import Transformer
from baleen.parallel.expert import ExpertParallel, shard_experts
from baleen.parallel.mesh import Grid, Mesh, stages_of
from baleen.parallel.ranks import limit_waiting, node_size
from baleen.parallel.shard import shard, synchronise
from baleen.parallel.stage import Objective, Stage, Told, split_layers
from baleen.parallel.state import copy_piece, offset_of
from baleen.parallel.worker import MicroBatch, Totals
from baleen.recipe import ParallelConfig

BIAS = "mlp.gate.e_score_correction_bias"
EMBEDDING = "model.embed_tokens.weight"
PipelineSchedule = PipelineScheduleSingle | PipelineScheduleMulti
TORCH_SCHEDULES = {"1f1b": "1F1B", "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}


def join(model: Transformer, parallel: ParallelConfig, grid: Grid, device: torch.device | None = None) -> Team:
    """This process's worker, of all that call this together; of `model`, alike everywhere, it takes its part.

    Of a model on `meta` that part, and nothing else, is made on `device`: without numbers until `init_weights`.
    """
    team = take_part(model, parallel, Mesh(grid, (device or model.device).type), device)
    limit_waiting(parallel.timeout_seconds)
    return team


def take_part(model: Transformer, parallel: ParallelConfig, mesh: Mesh, device: torch.device | None = None) -> Team:
    if mesh.grid.expert > 1:
        shard_experts(model, mesh.expert_group, fp8=parallel.dispatch == "fp8", node_size=node_size())
    return (PipelineTeam if mesh.grid.pipeline > 1 else Team)(model, parallel, mesh, device or model.device)


class Team:
    """A Worker with a whole model, its experts and weights spread over the ranks of the mesh."""

    def __init__(self, model: Transformer, parallel: ParallelConfig, mesh: Mesh, device: torch.device):
        self.parallel, self.mesh, self.device = parallel, mesh, device
        self.config: ModelConfig = model.config
        degrees = {"PP": mesh.grid.pipeline, "DP": mesh.grid.data, "EP": mesh.grid.expert}
        words = [f"{name}{value}" for name, value in degrees.items() if value > 1] + [f"ZeRO-{parallel.zero}"]
        self.layout = " ".join([*words, *([parallel.schedule] if mesh.grid.pipeline > 1 else [])])
        self.rank, self.world = dist.get_rank(), mesh.grid.world
        self.data_rank, self.data_ranks = mesh.data_rank, mesh.grid.data
        self.parts: list[nn.Module] = self._cut(model)
        is_empty = model.device.type == "meta"
        for part in self.parts:
            shard(part, mesh, parallel.zero)
            if is_empty:
                part.to_empty(device=device)
        self._whole = {name: p for part in self.parts for name, p in part.named_parameters()}
        self.parameters = {name: _local_parameter(p) for name, p in self._whole.items()}

    def _cut(self, model: Transformer) -> list[nn.Module]:
        return [model]

    def init_weights(self, seed: int) -> None:
        """Each rank its own part of what Transformer.init_weights gives a whole model."""
        for name, parameter in self.parameters.items():
            part = self.placed(name, parameter.detach())
            if not isinstance(part, DTensor):
                fill(part, name, self.config, seed)
            elif ".experts." in name:
                fill(part.to_local(), name, self.config, seed, first_expert=offset_of(part)[0])
            else:
                copy_piece(part, initial(name, part.shape, self.config, seed))
        for gate in self.gates.values():
            gate.e_score_correction_bias = torch.zeros(self.config.n_routed_experts, device=self.device)
        for part in self.parts:
            part.model.rotary.reset_parameters()  # type: ignore[union-attr, operator]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of shards, the part that lies here: what an optimizer works on."""
        yield from self.parameters.items()

    @property
    def gates(self) -> dict[int, Gate]:
        return dict(enumerate(self.model.gates))

    @property
    def model(self) -> Transformer:
        """The whole model; whoever calls it, all ranks must."""
        (model,) = self.parts
        assert isinstance(model, Transformer), "a pipeline has no whole model"
        return model

    def accumulate(self, micro_batches: list[MicroBatch], objective: Objective) -> Totals:
        self._drop_gradients()
        told = []
        for number, micro_batch in enumerate(micro_batches, 1):
            synchronise(self.model, self.parallel.zero, last=number == len(micro_batches))
            loss = objective.of_model(self.model, *micro_batch)
            loss.total.backward()
            told.append((list(self.gates), Told(loss.main, loss.mtp, loss.balance, loss.loads)))
        self.bring_gradients()
        return self._totals(told)

    def _drop_gradients(self) -> None:
        for parameter in self._whole.values():
            parameter.grad = None

    def bring_gradients(self) -> None:
        """From the shards, which FSDP fills, to what the optimizer reads."""
        for name, parameter in self._whole.items():
            self.parameters[name].grad = None if parameter.grad is None else local(parameter.grad)

    def _totals(self, told: list[tuple[list[int], Told]]) -> Totals:
        """Sums over micro-batches and ranks; `told` names the gates that each list of loads is of."""
        config = self.config
        moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_layers_with_mtp))
        loads_GE = torch.zeros(moe_layers, config.n_routed_experts, dtype=torch.int64, device=self.device)
        losses = torch.zeros(3, dtype=torch.float64, device=self.device)
        for gates, (*values, loads) in told:
            losses += torch.stack(values).double()
            for gate, load in zip(gates, loads, strict=False):  # fewer where the MTP layers are left out
                loads_GE[gate] += load
        trips = torch.tensor([d.take_reached() for d in self._dispatchers()] or [(0, 0)], device=self.device).sum(0)
        for total in (losses, loads_GE, trips):
            dist.all_reduce(total)
        main, mtp, balance = losses.tolist()
        passed, reached = trips.tolist()
        ran = int(loads_GE.any(1).sum())  # not MTP's gates, the last ones, where its loss has no weight
        return Totals(main, mtp, balance, list(loads_GE[:ran]), reached / passed if passed else None)

    def _dispatchers(self) -> Iterator[ExpertParallel]:
        for module in (module for part in self.parts for module in part.modules()):
            if isinstance(module, DeepseekMoE) and isinstance(module.dispatch, ExpertParallel):
                yield module.dispatch

    def clip_gradients(self, max_norm: float) -> Tensor:
        """The norm is that of all gradients once, wherever they lie: shards add up, copies are not counted again."""
        grads = [(name, p.grad) for name, p in self.parameters.items() if p.grad is not None]
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, grad in grads:
            square += torch.linalg.vector_norm(grad, dtype=torch.float64).square() / self.copies(name)
        dist.all_reduce(square)
        norm = square.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for _, grad in grads:
            grad.mul_(scale.to(grad.dtype))
        return norm

    def copies(self, name: str) -> int:
        """Ranks that hold the same piece of this parameter, and of its gradient after a step."""
        if self.parallel.zero:
            return self.mesh.grid.replicate
        return self.mesh.grid.replicas if ".experts." in name else self.mesh.grid.data

    def tensors(self) -> dict[str, Tensor]:
        """What this rank holds of the model's weights and saved buffers, by name."""
        dense = self.config.first_k_dense_replace
        biases = {f"model.layers.{i + dense}.{BIAS}": gate.e_score_correction_bias for i, gate in self.gates.items()}
        return {name: p.detach() for name, p in self.parameters.items()} | biases

    def placed(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor shaped like this rank's part of parameter `name`, as a part of the whole: a view."""
        whole, mesh = self._whole.get(name), self.mesh
        if whole is None or tensor.shape != self.parameters[name].shape:  # a buffer, or an optimizer's count of steps
            return tensor
        if ".experts." in name and mesh.grid.expert > 1:
            inner = whole.placements[-1] if isinstance(whole, DTensor) and self.parallel.zero else Replicate()
            shape = (self.config.n_routed_experts, *whole.shape[1:])
            return _from_local(tensor, mesh.stored_experts, (Replicate(), Shard(0), inner), shape)
        if isinstance(whole, DTensor):
            return _from_local(tensor, whole.device_mesh, whole.placements, whole.shape)
        return tensor

    def sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.mesh.data.get_group())
        return total.item()


class PipelineTeam(Team):
    """A Worker with one or two stages of the model, run by PyTorch's pipeline schedules.

    `model` is cut up: it must not be used as a whole any more.
    """

    parts: list[Stage]  # type: ignore[assignment]

    def _cut(self, model: Transformer) -> list[nn.Module]:
        parallel, ranks, rank = self.parallel, self.mesh.grid.pipeline, self.mesh.pipeline_rank
        assert parallel.zero <= 1, "make_grid refuses it"
        self.stages = stages_of(parallel)
        folded = self.stages > ranks  # V-shaped: the last stage returns to the first rank
        self._copied_embedding = bool(model.config.num_nextn_predict_layers) and not folded
        self._dtype = model.lm_head.weight.dtype
        self._ends = self._groups_of_ends()
        self._made: tuple[tuple[int, ...], PipelineSchedule] | None = None
        layers = split_layers(model.config, self.stages)
        self.here = [rank, self.stages - 1 - rank] if folded else [rank]
        return [
            Stage(model, layers[s], first=s == 0, last=s == self.stages - 1, lends_embedding=folded) for s in self.here
        ]

    def _groups_of_ends(self) -> dist.ProcessGroup | None:
        """This rank with the one at the other end of its pipeline, if it stands at an end and MTP embeds there."""
        grid, mine = self.mesh.grid, None
        for d in range(grid.data if self._copied_embedding else 0):
            ends = [d, (grid.pipeline - 1) * grid.data + d]
            group = dist.new_group(ends)
            if isinstance(group, dist.ProcessGroup) and self.rank in ends:
                mine = group
        return mine

    @property
    def gates(self) -> dict[int, Gate]:
        dense = self.config.first_k_dense_replace
        return {layer - dense: gate for stage in self.parts for layer, gate in stage.gates.items()}

    def accumulate(self, micro_batches: list[MicroBatch], objective: Objective) -> Totals:
        self._drop_gradients()
        for stage in self.parts:
            stage.objective, stage.told = objective, []
        columns = list(zip(*micro_batches, strict=True))
        tokens, documents, masks = (None if c[0] is None else torch.cat(c) for c in columns[:3])
        given = {"tokens": tokens, "shares": torch.stack(columns[3]).to(self.device)}
        given |= {name: rows for name, rows in (("document_ids", documents), ("loss_mask", masks)) if rows is not None}
        arguments = [tokens] if self.parts[0].first else []
        target = tokens if self.parts[-1].last else None  # the loss is taken in the stage; this is for form's sake
        self._schedule(micro_batches).step(*arguments, target=target, return_outputs=False, **given)
        self.bring_gradients()
        self._add_up_embedding()
        dense = self.config.first_k_dense_replace
        return self._totals([([layer - dense for layer in s.gates], told) for s in self.parts for told in s.told])

    def _schedule(self, micro_batches: list[MicroBatch]) -> PipelineSchedule:
        """The schedule for this many micro-batches of this shape.

        Only the newest is kept: each has buffers for all that its stages receive in a step.
        """
        B, width = micro_batches[0].tokens.shape
        key = (len(micro_batches), B, width)
        if self._made is None or self._made[0] != key:
            self._made = None  # and its buffers, before there are new ones
            hidden = torch.empty(B, width - 1, self.config.hidden_size, dtype=self._dtype, requires_grad=True)
            tokens, loss = micro_batches[0].tokens, torch.empty((), dtype=self._dtype, requires_grad=True)
            stages = [
                PipelineStage(
                    part,
                    index,
                    self.stages,
                    self.device,
                    input_args=tokens if part.first else hidden,
                    output_args=loss if part.last else hidden,
                    group=self.mesh.pipeline_group,
                )
                for index, part in zip(self.here, self.parts, strict=True)
            ]
            kind = get_schedule_class(TORCH_SCHEDULES[self.parallel.schedule])
            made = kind(
                stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
                n_microbatches=len(micro_batches),
                loss_fn=lambda loss, target: loss,
                scale_grads=False,
            )
            self._made = key, made
        return self._made[1]

    def _add_up_embedding(self) -> None:
        """Both copies of the embedding get the sum of their gradients, and so stay alike."""
        if self._ends is not None:
            weight = self.parameters[EMBEDDING]
            if weight.grad is None:  # where the MTP layers are left out
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad, group=self._ends)

    def copies(self, name: str) -> int:
        return super().copies(name) * (2 if self._copied_embedding and name == EMBEDDING else 1)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.to_local().detach()) if isinstance(parameter, DTensor) else parameter


def _from_local(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
