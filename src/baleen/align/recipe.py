"""What post-training is made of: a base, tasks, and stages one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, field_validator, model_validator

from baleen.align.tasks import ReasoningGym, Task
from baleen.config import (
    Count,
    Fraction,
    ModelConfig,
    Momentum,
    NotNegative,
    Positive,
    Strict,
    UserError,
    validated,
    without_null,
)
from baleen.recipe import CostConfig, Recipe, ScheduleConfig, TrainConfig, read_recipe

Start = Literal["previous", "base"]
Heat = Annotated[float, Field(gt=0.0, le=100.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class RewardConfig(Strict):
    """`name`: accuracy (the task's own verifier), one of rewards.REWARDS, or a user's function as FILE.py:FUNCTION."""

    name: str
    weight: float = 1.0


class SamplingConfig(Strict):
    """How answers are drawn."""

    temperature: Heat = 1.0  # in RL also that of the log-probabilities which are trained on
    top_p: Share = 1.0  # below 1 for sample stages alone
    max_tokens: Positive = 256


class SFTStage(Strict):
    """Supervised fine-tuning on the assistant's words: worked solutions, conversations from files, sampled answers."""

    kind: Literal["sft"] = "sft"
    start: Start = "previous"
    worked: Count = 0  # different training questions with the task's own worked solution (a cold start)
    tasks: tuple[Task, ...] = ()  # of these; none: those of the recipe
    hasty: Fraction = 0.0  # share of them that leave out every intermediate result
    sources: tuple[str, ...] = ()  # files or packages of conversations
    sampled: bool = False  # what the sample stages before kept
    eval_samples: Count = 0  # answers to a held-out question at temperature 1, beside the greedy one
    train: TrainConfig  # eval_every: of held-out questions, at the end too; 0: not at all. No samples are shown
    schedule: ScheduleConfig = ScheduleConfig()

    @field_validator("train", mode="before")
    @classmethod
    def _each_by_itself(cls, train: Any) -> Any:
        """V3 §5.1. A recipe says so, once it is resolved."""
        return {"document_mask": True, **train} if isinstance(train, dict) else train

    @model_validator(mode="after")
    def _something(self) -> SFTStage:
        if not (self.worked or self.sources or self.sampled):
            raise ValueError("an sft stage has nothing to learn from: set worked, sources or sampled = true")
        if self.hasty and not self.worked:
            raise ValueError("hasty is a share of the worked solutions: set worked, or leave out hasty")
        if self.eval_samples and not self.train.eval_every:
            raise ValueError("eval_samples are drawn every train.eval_every steps: set that, or leave out eval_samples")
        if not self.train.document_mask:
            raise ValueError("an sft stage shows each conversation by itself: leave out train.document_mask")
        if self.train.ema_decay:
            raise ValueError("an sft stage hands on the weights, not their average: leave out train.ema_decay")
        return self


class SampleStage(Strict):
    """Rejection sampling: many answers a question, of which a few right ones are kept for a later sft stage.

    With a `teacher` (a RUN) its answers are sampled: distillation.
    """

    kind: Literal["sample"] = "sample"
    teacher: str = ""
    tasks: tuple[Task, ...] = ()
    questions: Positive = 512
    samples: Positive = 4
    keep: Positive = 1  # different right answers a question, the shortest first
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()


class RLStage(Strict):
    """GRPO (arXiv 2402.03300) as R1 used it, with the variants that came after as options."""

    kind: Literal["rl"] = "rl"
    start: Start = "previous"
    tasks: tuple[Task, ...] = ()
    steps: Positive
    questions: Positive = 32  # a step
    group_size: Annotated[int, Field(ge=2)] = 16  # answers a question
    minibatches: Positive = 1  # updates a rollout
    inner_epochs: Positive = 1  # times that a rollout is gone through
    micro_batch_tokens: Positive = 8192  # of one forward
    lr: float = Field(3e-6, gt=0.0)
    warmup_steps: Count = 0
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: NotNegative = 0.0
    clip_norm: float = Field(1.0, gt=0.0)
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # bf16 widens the gap between rollout and training
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # how tokens are weighed, see grpo.policy_loss
    importance_level: Literal["token", "sequence"] = "token"  # sequence: GSPO, arXiv 2507.18071
    scale_rewards: Literal["group", "batch", "none"] = "group"  # none: Dr. GRPO, arXiv 2503.20783
    clip_eps: float = Field(0.2, gt=0.0)
    clip_eps_high: NotNegative = 0.0  # 0: as clip_eps; higher: DAPO's clip-higher, arXiv 2503.14476
    kl_coef: NotNegative = 0.001
    reference_every: Count = 400  # steps after which the policy becomes the reference; 0: never
    # Further rollouts at most to replace groups of no variance (DAPO); 0: off.
    dynamic_sampling: Annotated[int, Field(ge=0, le=100)] = 0
    mask_truncated: bool = False  # answers cut off by length teach nothing (DAPO's overlong filtering)
    overlong_buffer: Count = 0  # last tokens before max_tokens, over which the reward falls by 1 (DAPO); 0: off
    bias_update_speed: NotNegative = 0.0  # of the router's bias; 0: frozen
    sampling: SamplingConfig = SamplingConfig()
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)] = (
        RewardConfig(name="accuracy"),
        RewardConfig(name="format"),
    )
    reward_seconds: float = Field(5.0, gt=0.0)  # after which a reward function counts as hanging
    eval_every: Count = 20  # steps between looks at held-out questions; 0: only at the end
    eval_questions: Positive = 200
    checkpoint_every: Count = 20
    seed: Seed = 0

    @model_validator(mode="after")
    def _divides(self) -> RLStage:
        if self.questions * self.group_size % self.minibatches:
            raise ValueError(
                f"minibatches ({self.minibatches}) does not divide the {self.questions * self.group_size} answers of a "
                "step (questions * group_size)"
            )
        if self.sampling.top_p != 1.0:
            raise ValueError(
                f"sampling.top_p is {self.sampling.top_p}, but rl learns from the log-probabilities of the whole "
                "distribution: leave out top_p"
            )
        if self.overlong_buffer and self.mask_truncated:
            raise ValueError("overlong_buffer punishes long answers, mask_truncated leaves them out: choose one")
        if self.overlong_buffer >= self.sampling.max_tokens:
            limit = self.sampling.max_tokens
            raise ValueError(f"overlong_buffer ({self.overlong_buffer}) must be below sampling.max_tokens ({limit})")
        return self


Stage = Annotated[SFTStage | SampleStage | RLStage, Field(discriminator="kind")]


class AlignRecipe(Strict):
    """A whole post-training: where the weights come from, what is practised, and the stages in order.

    `base` is a RUN whose model is trained on; without it [model] is made anew, with a tokenizer from the first stage's
    text.
    """

    name: str = "recipe"
    base: str = ""
    model: ModelConfig | None = None
    system: str = ""  # a system message before every question
    tasks: tuple[Task, ...] = ()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _whole(self) -> AlignRecipe:
        if bool(self.base) == bool(self.model):
            raise ValueError("give either base (a RUN to go on from) or [model] (a network to make), not both")
        for number, stage in enumerate(self.stages, 1):
            practises = isinstance(stage, RLStage | SampleStage) or stage.worked
            if practises and not (stage.tasks or self.tasks):
                raise ValueError(f"stage {number} ({stage.kind}) has no tasks: add [[tasks]] with a name")
            tasks = stage.tasks or self.tasks
            if isinstance(stage, SFTStage) and stage.worked and any(isinstance(task, ReasoningGym) for task in tasks):
                raise ValueError(
                    f"stage {number} (sft) wants worked solutions, which tasks of reasoning_gym do not have: leave out "
                    "worked, or give the stage tasks of its own"
                )
            before = self.stages[: number - 1]
            if isinstance(stage, SFTStage) and stage.sampled and not any(s.kind == "sample" for s in before):
                raise ValueError(f"stage {number} (sft) wants sampled answers, but no sample stage comes before it")
        return self

    def to_toml(self) -> str:
        """As every recipe's; without [model] where the base brings it."""
        return tomli_w.dumps(without_null(self.model_dump(exclude=None if self.model else {"model"})))

    def training(self, model: ModelConfig, stage: SFTStage) -> Recipe:
        """An sft stage as a recipe of training, for the trainer. Raises UserError if it does not fit the model."""
        parts = {"model": model, "train": stage.train, "schedule": stage.schedule, "cost": self.cost}
        raw = {"name": self.name} | {name: part.model_dump() for name, part in parts.items()}
        return validated(Recipe, raw, f"recipe {self.name}")


def load_align_recipe(name_or_path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> AlignRecipe:
    """As `load_recipe`, for a recipe with stages; stages are overridden by number, as in stages.0.train.lr=1e-3."""
    return read_recipe(AlignRecipe, name_or_path, overrides)


def for_command(command: str, recipe: AlignRecipe, base: str = "", teacher: str = "") -> AlignRecipe:
    """The recipe as `baleen sft | rl | distill` runs it, with the base and the teacher of the command line.

    Raises UserError for a recipe that the command is not for.
    """
    wanted = {"sft": SFTStage, "rl": RLStage, "distill": SampleStage}[command]
    if not any(isinstance(stage, wanted) for stage in recipe.stages):
        kinds = ", ".join(stage.kind for stage in recipe.stages)
        raise UserError(f"recipe {recipe.name} has no {wanted.model_fields['kind'].default} stage, only {kinds}")
    raw = recipe.model_dump()
    if base:
        raw |= {"base": str(Path(base).absolute()) if Path(base).exists() else base, "model": None}
    if teacher:
        path = str(Path(teacher).absolute()) if Path(teacher).exists() else teacher
        raw["stages"] = [s | {"teacher": path} if s["kind"] == "sample" else s for s in raw["stages"]]
    if command == "distill" and not any(s.get("teacher") for s in raw["stages"]):
        raise UserError("distillation needs a teacher: give --teacher RUN")
    return validated(AlignRecipe, raw, f"recipe {recipe.name}")
