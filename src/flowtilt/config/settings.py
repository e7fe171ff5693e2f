"""What a run is, as data: the tables of a recipe, and what has to agree between them."""

import os
import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flowtilt.config.keys import Key, keys_of
from flowtilt.config.prompt_data import as_source, shown
from flowtilt.io.user_code import absolute
from flowtilt.methods import Objective, own
from flowtilt.methods.base import LEVELS, MOST_LAG, NO_CLIP, ROLLOUTS, WEIGHT, Table, Weight
from flowtilt.methods.nft import NFTSettings
from flowtilt.methods.schedule import Schedule

IMAGES = 10_000_000
"""Bound of images, and of prompts."""
CPS_ETA = 0.9
"""That of the few-step students which RTDMD (arXiv 2605.26108) distils."""


class ModelSettings(Table):
    path: str = Field(min_length=1)
    """A diffusers pipeline: a folder, a hub id, or "playground", the one inside the package. `model = "…"` sets it alone."""
    revision: str | None = None
    """Commit or tag of a hub id; none takes the newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen base; "auto" is bfloat16 on a GPU and float32 on a CPU. LoRA weights and latents are always float32."""
    quantize: Literal["int8", "nf4"] | None = None
    """The frozen network in 8 or 4 bits per weight, for one that does not fit; needs flowtilt[quantize] (docs/reference/models.md)."""
    t5_length: int | None = Field(default=None, ge=0, le=512)
    """Tokens of the T5 prompt; none takes the family's own: for SD3 DiffusionNFT's 128, or what its T5 reads, 0 without one."""
    resolution: int | None = Field(default=None, ge=8, le=16_384)
    """Height and width of the images in pixels; none takes the pipeline's own."""
    levels: Literal["rule", "stock"] = "rule"
    """Noise levels: the pipeline's shift applied once, or as diffusers has them without `sigmas`, as published code for SD3 samples."""
    adapter: str | None = Field(default=None, min_length=1)
    """The class "file.py:Class" that adapts a family which flowtilt does not know (docs/guides/add-a-model.md)."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further keywords for the adapter: FLUX.1-dev's `embedded_guidance`, or those of your own class."""
    offload: Literal["auto"] | bool = "auto"
    """Text encoders and reward models are on the GPU only while they work; "auto" does so below 36 GiB of memory."""
    recompute: Literal["auto"] | bool = "auto"
    """Gradient checkpointing: less memory for a third more forward work; "auto" begins where fewer than 4 rows would fit."""
    compile: bool = False
    """torch.compile of the network's blocks: 1.6 times as fast on an H100, after a minute or two; where it fails they run as they are."""
    fuse_norms: bool = False
    """Normalised queries and keys in one kernel, for a half-precision base: less rounding than diffusers', so other bits."""
    attention: str | None = Field(default=None, min_length=1)
    """A diffusers attention backend, "flash", "_flash_3", "sage", "native", …; none takes torch's own choice."""

    @field_validator("adapter")
    @classmethod
    def _with_whole_path(cls, adapter: str | None) -> str | None:
        """A run goes on, and its LoRA is drawn with, from anywhere."""
        return adapter and absolute(adapter)


class LoraSettings(Table):
    rank: int = Field(default=32, ge=1, le=16_384)
    """Rank r of the LoRA update."""
    alpha: float = Field(default=64.0, gt=0, le=WEIGHT)
    """The update is alpha / r times B A."""
    init: str | None = Field(default=None, min_length=1)
    """LoRA to start from, of this rank and alpha: a run, folder or file (docs/guides/lora.md). The KL's reference lacks it."""
    on: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Frozen LoRAs under the trained one, in order: runs, folders or files (docs/guides/lora.md). The reference is the base with them."""

    @field_validator("init")
    @classmethod
    def _with_whole_path(cls, init: str | None) -> str | None:
        return init and _whole(init)

    @field_validator("on")
    @classmethod
    def _with_whole_paths(cls, on: tuple[str, ...]) -> tuple[str, ...]:
        """A run goes on, and its LoRA is drawn with what lies beneath it, from anywhere."""
        return tuple(_whole(place) for place in on)


def _whole(place: str) -> str:
    """PATH or PATH@ALPHA as an absolute one; what is not there stays as it was written, for the message that says so."""
    there = os.path.exists(place) or os.path.exists(place.rpartition("@")[0])
    return os.path.abspath(place) if there else place


def _known_eta(eta: Any, info: ValidationInfo) -> Any:
    """cps has an eta, whether or not one was said; filled in, so that a run's recipe tells it."""
    return CPS_ETA if eta is None and info.data.get("solver") == "cps" else eta


class RolloutSettings(Table):
    prompts: int = Field(default=48, ge=1, le=IMAGES)
    """Prompts per rollout."""
    images_per_prompt: int = Field(default=24, ge=1, le=IMAGES)
    """Images per prompt: the group in which rewards are compared. At least 2 if there are rewards."""
    train_per_prompt: int | None = Field(default=None, ge=2, le=IMAGES)
    """Train only this many images of each prompt, those whose rewards differ most (Pro-GRPO, arXiv 2512.15347); none trains all."""
    solver: Literal["euler", "ddim", "dpm1", "dpm2", "heun", "cps"] = "dpm2"
    """ODE solver of the rollout, or "cps" (arXiv 2509.05952) for few steps: all its steps but the last are stochastic."""
    eta: float | None = Field(default=None, gt=0, le=1)
    """Share of new noise in a step of cps, by default 0.9; the other solvers have none."""
    steps: int = Field(default=10, ge=1, le=LEVELS)
    """Solver steps."""
    guidance: float = Field(default=1.0, ge=1, le=WEIGHT)
    """Classifier-free guidance scale of the rollout; 1 turns it off."""
    lag: int = Field(default=0, ge=0, le=MOST_LAG)
    """Sample with the policy of so many rollouts before, while rewards are computed elsewhere; slows learning (docs/guides/lag.md)."""

    _eta = field_validator("eta", mode="before")(_known_eta)

    def images(self) -> int:
        """Of a rollout."""
        return self.prompts * self.images_per_prompt

    def trained(self) -> int:
        """Images of a rollout that are trained."""
        return self.prompts * (self.train_per_prompt or self.images_per_prompt)

    def cps_eta(self) -> float:
        """The eta of cps, which few-step students are trained with."""
        return CPS_ETA if self.eta is None else self.eta


class OptimizerSettings(Table):
    lr: float = Field(default=3e-4, gt=0, le=WEIGHT)
    """Peak learning rate of AdamW."""
    warmup: int = Field(default=0, ge=0, le=ROLLOUTS)
    """Optimizer steps of linear warm-up."""
    half_life: int | None = Field(default=None, ge=1, le=ROLLOUTS)
    """After this many optimizer steps the rate is half the peak: lr / (1 + s / half_life). None keeps it constant."""
    schedule: Schedule = 1.0
    """Factor of the rate: a number, or [[optimizer step, factor], ...], linear between the points."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averages."""
    weight_decay: float = Field(default=1e-4, ge=0, le=WEIGHT)
    """AdamW's decay of the LoRA weights."""
    eps: float = Field(default=1e-8, gt=0, le=WEIGHT)
    """AdamW's epsilon."""
    clip: float = Field(default=1.0, gt=0, le=NO_CLIP)
    """Greatest norm of the gradient."""
    steps_per_rollout: int = Field(default=1, ge=1, le=IMAGES)
    """Optimizer steps a rollout, each on its own share of the images."""


class CheckpointSettings(Table):
    every: int = Field(default=10, ge=1, le=ROLLOUTS)
    """Rollouts between checkpoints."""
    keep: int = Field(default=2, ge=1, le=ROLLOUTS)
    """Newest checkpoints that are kept."""


class LogSettings(Table):
    rollouts: bool = False
    """Write every rollout's images, scores and advantages into rollouts/ of the run, as a Parquet table that `datasets` reads."""


class EvaluateSettings(Table):
    every: int = Field(default=10, ge=0, le=ROLLOUTS)
    """Rollouts between evaluations; 0 evaluates only before and after."""
    prompts: str | None = None
    """As `prompts`; none takes the other split of a playground run, else the training prompts."""
    rewards: tuple[str, ...] = ()
    """Rewards to report, the first of them as the score, "geneval/strict" being a detail of one; none takes those of `[rewards]`."""
    images: int = Field(default=240, ge=1, le=IMAGES)
    """Images, spread evenly over tags and prompts, always from the same noise."""
    solver: Literal["euler", "ddim", "dpm1", "dpm2", "heun", "cps"] = "euler"
    """ODE solver, or "cps", as in `[rollout]`."""
    eta: float | None = Field(default=None, gt=0, le=1)
    """Share of new noise in a step of cps, by default 0.9; the other solvers have none."""
    steps: int = Field(default=40, ge=1, le=LEVELS)
    """Solver steps."""
    guidance: float = Field(default=1.0, ge=1, le=WEIGHT)
    """Classifier-free guidance scale; 1 turns it off."""
    samples: int = Field(default=24, ge=0, le=IMAGES)
    """Images of each evaluation that are kept for the report."""

    _prompts = field_validator("prompts", mode="before")(as_source)
    _eta = field_validator("eta", mode="before")(_known_eta)


class RewardSettings(Table):
    source: str | None = Field(default=None, min_length=1)
    """A built-in reward's name, "file.py:function", or the address of a `flowtilt serve-rewards`; none takes the key's own name."""
    weight: Weight = 1.0
    """Its weight in the sum; 0 is measured and not trained on."""
    compat: bool = False
    """Give upstream's numbers also where upstream is wrong (docs/reference/rewards.md says where)."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further keywords for it; they may also stand beside `source`."""

    @model_validator(mode="before")
    @classmethod
    def _options_beside(cls, table: Any) -> Any:
        """Other keys are the reward's own. One that nearly is a key of this table stays, and is an error."""
        if not isinstance(table, dict):
            return table
        known = cls.model_fields
        own = [key for key in table if key not in known and not get_close_matches(key, known, 1, cutoff=0.8)]
        options = table.get("options", {})
        if not own or not isinstance(options, dict):
            return table
        return {key: value for key, value in table.items() if key not in own} | {"options": options | {key: table[key] for key in own}}

    def keywords(self) -> dict[str, Any]:
        """What the reward is built with."""
        return {"compat": True, **self.options} if self.compat else dict(self.options)


class Recipe(Table):
    name: str = Field(default="run", pattern=r"^\.*[\w-][\w.-]*$", max_length=100)
    """Name of the run and of its folder."""
    model: ModelSettings
    """The base model."""
    prompts: str = Field(min_length=1)
    """Training prompts: a .txt, .csv or .jsonl file, a set ("ocr-train", see `flowtilt prompts`), or {dataset, column, split} of a hub."""
    tags: dict[str, Annotated[int, Field(ge=0, le=LEVELS)]] | Literal["auto"] = Field(default_factory=dict)
    """How often a tag takes its turn: {tag = number}. Default 1; 0 leaves a tag out; "auto" prefers tags with low rewards."""
    prompts_by: Literal["turn", "variance"] = "turn"
    """Order of a tag's prompts: each once per pass, or more often those whose rewards differ (CGPO, arXiv 2605.17807)."""
    rewards: dict[str, Weight | Annotated[str, Field(min_length=1)] | RewardSettings] = Field(min_length=1)
    """Name = weight, name = "file.py:function" or "http://host:port" (weight 1), or name = {source, weight, and its options}."""
    combine: Literal["sum", "normalized", "group", "marble"] = "sum"
    """How rewards add up: weighted sum of raw scores, of scores normalised over the rollout or over the group (GDPO), or MARBLE."""
    advantage: Literal["global", "group", "none"] = "global"
    """Standard deviation that divides advantages: of all rewards of the rollout, of the group's, or none."""
    objective: Objective = NFTSettings()
    """The loss. `type` chooses the method and with it the other keys; "file.py:Class" is your own."""
    rollout: RolloutSettings = RolloutSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA on the frozen base, or all weights of its network (docs/guides/full.md), then without `[lora]`."""
    lora: LoraSettings = LoraSettings()
    ema: float = Field(default=0.9, ge=0, lt=1)
    """Greatest decay of the average that is evaluated and saved; it warms up as (1 + s) / (10 + s)."""
    ema_every: int = Field(default=1, ge=1, le=ROLLOUTS)
    """Optimizer steps per update of that average; FlowGRPO's code has 8."""
    rollouts: int = Field(default=1000, ge=1, le=ROLLOUTS)
    """Rollouts of the run: each samples images, scores them and trains on them."""
    seed: int = Field(default=0, ge=0, le=2**64 - 1)
    """Seed of all random numbers."""
    run: str | None = None
    """Folder of the run; by default runs/<name>, with a number if that exists."""
    micro_batch: Annotated[int, Field(le=IMAGES)] | Literal["auto"] = "auto"
    """Rows that pass through the network at once. It changes memory and speed, never results."""
    shard: Literal["none", "base", "weights"] = "none"
    """"base" spreads the frozen network over all processes (FSDP2), for one that does not fit on a device; "weights" spreads all
    trained weights of train = "full". Both need a micro_batch."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    guards: Literal["warn", "stop", "off"] = "warn"
    """What to do when training looks broken: warn in one line, stop with a checkpoint, or nothing."""
    track: tuple[Literal["wandb", "tensorboard", "trackio", "mlflow"], ...] = ()
    """"wandb", "tensorboard", "trackio", "mlflow": they also get metrics, scores and samples (docs/guides/trackers.md)."""

    _prompts = field_validator("prompts", mode="before")(as_source)

    @field_validator("rewards")
    @classmethod
    def _with_whole_paths(cls, rewards: dict[str, float | str | RewardSettings]) -> dict[str, float | str | RewardSettings]:
        """A run goes on wherever it is resumed from."""

        def whole(value: float | str | RewardSettings) -> float | str | RewardSettings:
            if isinstance(value, RewardSettings):
                return value.model_copy(update={"source": value.source and absolute(value.source)})
            return absolute(value) if isinstance(value, str) else value

        return {name: whole(value) for name, value in rewards.items()}

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        images = self.rollout.images()
        if images > IMAGES:
            raise ValueError(f"rollout.images_per_prompt: {images} images in a rollout are too many; at most {IMAGES}")
        if self.rollout.trained() > images:
            raise ValueError(
                f"rollout.train_per_prompt: {self.rollout.train_per_prompt} images of a prompt, but a rollout has "
                f"{self.rollout.images_per_prompt} of each; lower it"
            )
        if self.optimizer.steps_per_rollout > self.rollout.trained():
            raise ValueError(f"optimizer.steps_per_rollout: more steps than the {self.rollout.trained()} trained images of a rollout")
        for name, table in (("rollout", self.rollout), ("evaluate", self.evaluate)):
            if table.eta is not None and table.solver != "cps":
                raise ValueError(f"{name}.eta: belongs to {name}.solver = 'cps', not {table.solver!r}")
        own.check(self.objective, self)
        if self.combine == "marble":
            self._check_marble()
        if self.rollout.lag > (most := self.objective.most_lag):
            takes = f"at most {most}" if most else "the images of the trained policy alone"
            raise ValueError(f"rollout.lag: {self.objective.type} takes {takes}, not a lag of {self.rollout.lag}; lower it")
        if self.log.rollouts and not self.objective.scores:
            raise ValueError(f"log.rollouts: {self.objective.type} has no scored rollouts; leave it out")
        if self.train == "full":
            self._check_full()
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise ValueError("optimizer.betas: each must be at least 0 and below 1")
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            raise ValueError("micro_batch: must be at least 1")
        if self.model.quantize and (self.train == "full" or self.shard != "none"):
            why = 'train = "full" trains the weights' if self.train == "full" else f'shard = "{self.shard}" spreads weights that are whole'
            raise ValueError(f"model.quantize: {why}; leave it out")
        if self.shard == "weights" and self.train != "full":
            raise ValueError('shard: "weights" spreads trained weights, of train = "full"; for a LoRA set shard = "base"')
        if self.shard != "none":
            if self.micro_batch == "auto":
                raise ValueError(
                    "micro_batch: a sharded base needs a number; memory that ends on one rank alone would leave the others behind"
                )
            if self.model.compile:
                raise ValueError(f'model.compile: does not go with shard = "{self.shard}"; leave one of them out')
        for name in self.rewards:
            if "/" in name or name == "total" or re.fullmatch(r"top_\d+|.*_std", name):
                raise ValueError(f"rewards.{name}: metrics have such names, choose another without a slash")
        return self

    def _check_marble(self) -> None:
        """Raises ValueError where the rewards can't be weighed by their gradients."""
        weights = {name: reward.weight for name, reward in self.reward_table().items() if reward.weight}
        if len(weights) < 2:
            raise ValueError('combine: "marble" weighs rewards against each other, and only one has a weight; set combine = "sum"')
        if odd := [name for name, weight in weights.items() if abs(weight) != 1]:
            raise ValueError(f'rewards.{odd[0]}: combine = "marble" finds the weights itself; set 1, -1 to lower it, or 0 to measure it')
        if not self.objective.affine:
            raise ValueError(f'combine: "marble" does not go with {self.objective.type}, whose loss can\'t be split by rewards')
        if self.train == "full":
            raise ValueError('combine: "marble" keeps a gradient for each reward, of LoRAs alone; set train = "lora"')

    def _check_full(self) -> None:
        """Raises ValueError where something belongs to LoRAs or to a frozen base."""
        fresh = LoraSettings()
        if changed := [name for name in LoraSettings.model_fields if getattr(self.lora, name) != getattr(fresh, name)]:
            raise ValueError(f'lora.{changed[0]}: there is no LoRA with train = "full"; leave it out')
        if self.shard == "base":
            raise ValueError('shard: "base" spreads a frozen base, and train = "full" has none; set shard = "weights"')
        if not self.objective.trains_all_weights:
            raise ValueError(f'train: {self.objective.type} trains LoRAs alone; set train = "lora"')

    def rows_per_image(self) -> int:
        """How often each image of a rollout is trained: at several noise levels, or at several steps of its path."""
        return self.objective.rows_per_image(self.rollout.steps)

    def reward_table(self) -> dict[str, RewardSettings]:
        """The rewards in their longest form."""

        def whole(name: str, value: float | str | RewardSettings) -> RewardSettings:
            if isinstance(value, RewardSettings):
                return value if value.source else value.model_copy(update={"source": name})
            return RewardSettings(source=value) if isinstance(value, str) else RewardSettings(source=name, weight=value)

        return {name: whole(name, value) for name, value in self.rewards.items()}

    def protocol(self) -> str:
        """How the score is taken, in one line that belongs beside it."""
        e = self.evaluate
        judged = e.rewards[0] if e.rewards else next(iter(self.rewards))
        eta = "" if e.eta is None else f" of eta {e.eta:g}"
        prompts = shown(e.prompts or self.prompts)
        images = f"{e.images} images of {prompts} prompts, {e.steps} {e.solver} steps{eta}, guidance {e.guidance:g}"
        return f"{judged}, EMA weights, {images}, noise seed {self.seed}"


def known_keys() -> list[Key]:
    """Every key of a recipe in order, those of all objectives among them."""
    return list(keys_of(Recipe))
