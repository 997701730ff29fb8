"""Every configuration key: its type, unit, meaning, default and range.

This is the single truth about configuration. Hydra composes YAML into plain values, `Config`
checks them, the reference pages of the book are generated from it, and the trainer reads nothing
else. A docstring under a field is its documentation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from configs.machines import Cluster, Hardware, PeakTflops, PlanOptions
from configs.section import ConfigError, Fraction, Name, Section, Size, Text, Tokens
from configs.states import Checkpoint, Precision, Sharding
from configs.text import Data

__all__ = [
    "Checkpoint",
    "Cluster",
    "Config",
    "ConfigError",
    "Data",
    "Hardware",
    "PeakTflops",
    "PlanOptions",
    "Precision",
    "Sharding",
]


class Model(Section):
    """What is trained. Sizes are those of a decoder-only transformer."""

    name: str = ""
    """The preset's name; set from the file chosen for the group."""
    family: Literal["llama", "gpt2", "hf"]
    """Architecture built from the sizes below, or `hf`: architecture and weights come from `path`."""
    path: str | None = None
    """Hugging Face directory or hub id to continue from; only with family hf."""
    tokenizer: Text | None = None
    """Directory or hub id of a Hugging Face fast tokenizer; none means the one in path."""
    layers: Size | None = None
    """Transformer blocks."""
    hidden: Size | None = None
    """Width of the residual stream."""
    heads: Size | None = None
    """Attention (query) heads."""
    kv_heads: Size | None = None
    """Key and value heads; absent means as many as heads, fewer is grouped-query attention."""
    ffn: Size | None = None
    """Width of the feed-forward layer."""
    vocabulary: Size | None = None
    """Rows of the embedding table; at least as many as the tokenizer has ids."""
    sequence_length: Size
    """Tokens of a row that are predicted; a row holds one more."""
    tied_embeddings: bool = False
    """Whether input and output embeddings share one matrix."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding; family llama."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in normalisation layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability; family gpt2."""
    lora_rank: Size | None = None
    """Rank of LoRA adapters on the query and value projections, everything else frozen; none trains all
    weights."""
    lora_alpha: PositiveFloat | None = None
    """LoRA's output is scaled by lora_alpha / lora_rank; none means twice the rank."""
    frozen_blocks: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """First transformer blocks that are not trained."""

    @model_validator(mode="after")
    def _check(self) -> Model:
        sizes = ("layers", "hidden", "heads", "ffn", "vocabulary")
        if self.family == "hf":
            if not self.path:
                raise ValueError("model.path=null: family hf needs a Hugging Face directory or hub id")
            given = [key for key in (*sizes, "kv_heads") if getattr(self, key) is not None]
            if given:
                raise ValueError(
                    f"model.{given[0]}={getattr(self, given[0])}: not allowed with family hf, "
                    "the checkpoint in model.path fixes it"
                )
            return self
        if self.tokenizer is None:
            raise ValueError("model.tokenizer=null: needs a tokenizer's directory or hub id")
        if self.path is not None:
            raise ValueError(f"model.path={self.path}: only allowed with model=hf")
        for key in sizes:
            if getattr(self, key) is None:
                raise ValueError(f"model.{key}=null: family {self.family} needs a whole number above 0")
        assert self.hidden is not None
        assert self.heads is not None
        if self.hidden % self.heads:
            raise ValueError(f"model.heads={self.heads}: must divide model.hidden={self.hidden}")
        if self.family == "llama" and self.hidden // self.heads % 2:
            raise ValueError(
                f"model.heads={self.heads}: model.hidden / model.heads = {self.hidden // self.heads} "
                "must be even for rotary positions"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads}: must divide model.heads={self.heads}")
        if self.family == "gpt2" and self.kv_heads not in (None, self.heads):
            raise ValueError(f"model.kv_heads={self.kv_heads}: family gpt2 has one per head ({self.heads})")
        for key, most in (("frozen_blocks", "layers"), ("lora_rank", "hidden")):
            value, limit = getattr(self, key), getattr(self, most)
            if value is not None and value > limit:
                raise ValueError(f"model.{key}={value}: must be at most model.{most}={limit}")
        return self


class Budget(Section):
    """How many tokens the run may train on."""

    kind: Literal["chinchilla", "tokens", "flops", "epochs", "gpu_hours", "usd", "days"]
    """Which of the amounts below holds."""
    tokens_per_parameter: Annotated[float, Field(gt=0, le=1e7)] = 20.0
    """Tokens per model parameter; kind chinchilla (Hoffmann et al. 2022)."""
    law: Literal["rule", "besiroglu", "hoffmann"] = "rule"
    """What compute-optimal means: rule is 20 tokens per parameter; besiroglu and hoffmann are the
    parametric laws of Besiroglu et al. 2024 and Hoffmann et al. 2022, with unrounded constants."""
    tokens: Tokens | None = None
    """Tokens of all rows, padding and masked targets included; kind tokens."""
    flops: Annotated[float, Field(gt=0, le=1e32)] | None = None
    """Training FLOPs C; tokens = C / (6 N); kind flops."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Passes over the corpus with the largest weight; kind epochs."""
    gpu_hours: Annotated[float, Field(gt=0, le=1e13)] | None = None
    """Accelerator-hours of the whole run at the planned speed; kind gpu_hours."""
    usd: Annotated[float, Field(gt=0, le=1e13)] | None = None
    """US dollars at hardware.usd_per_hour and the planned speed; kind usd."""
    days: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Days on the configured machines at the planned speed; kind days."""
    unique_tokens: Tokens | None = None
    """Different tokens there are to train on; what exceeds them are repeats, worth less
    (Muennighoff et al. 2023). None means no limit is known."""
    parent_tokens: Tokens | None = None
    """Tokens the parent model was trained on; compares continuing with training anew on both."""

    @model_validator(mode="after")
    def _check(self) -> Budget:
        for key in ("tokens", "flops", "epochs", "gpu_hours", "usd", "days"):
            value = getattr(self, key)
            if self.kind == key and value is None:
                raise ValueError(f"budget.{key}=null: budget={key} needs a number above 0")
            if self.kind != key and value is not None:
                raise ValueError(f"budget.{key}={value}: contradicts budget={self.kind}, choose budget={key}")
        return self


class Objective(Section):
    """What the model learns to predict."""

    kind: Literal["causal"] = "causal"
    """causal: every next token."""
    logits: Literal["fp32", "bf16", "chunked"] = "fp32"
    """Format of logits and loss: fp32 copies them, bf16 does not, chunked never holds all at once.
    chunked is planned, not trained yet."""
    mask_documents: bool = False
    """Whether a token attends only to its own document, in which positions count from 0."""


class Optimizer(Section):
    """AdamW; weights of norms and biases are not decayed."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps both moments in one byte each; planned, not trained yet."""
    implementation: Literal["fused", "foreach", "loop"] = "fused"
    """How torch applies AdamW: in one kernel, on lists of tensors (needs a temporary copy), or one by one."""
    lr: PositiveFloat
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    clip_norm: PositiveFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""


class Schedule(Section):
    """Learning rate over the run, as a factor of optimizer.lr."""

    kind: Literal["cosine", "linear", "wsd"]
    """Shape after the warm-up; wsd stays at the peak and decays linearly at the end."""
    warmup_fraction: Fraction = 0.02
    """Share of the steps with a linearly rising rate."""
    decay_fraction: Fraction = 0.2
    """Share of the steps that decay; kind wsd."""
    final_ratio: Fraction = 0.1
    """Learning rate at the last step as a share of the peak."""

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"schedule.decay_fraction={self.decay_fraction}: "
                f"with warmup_fraction={self.warmup_fraction} it must be at most 1 in sum"
            )
        return self


class Evaluation(Section):
    """Perplexity on each corpus's validation shards."""

    every_steps: Size | None = None
    """Steps between evaluations; the first and the last step are always evaluated."""
    rows: Size = 256
    """Most rows read per corpus."""


class Tracker(Section):
    """Where metrics go besides RUN/metrics.jsonl."""

    kind: Literal["none", "wandb", "tensorboard"] = "none"
    """Service that receives the metrics."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """W&B's mode; offline needs no account, sync later with `wandb sync`."""
    project: Text = "trainyard"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; none means the account's default."""


class Run(Section):
    """Identity of a run."""

    name: Name | None = None
    """Name; none means model and time of day."""
    directory: Text | None = None
    """Run directory; none means runs/NAME under the current directory."""
    export: bool = True
    """Write the finished model to RUN/export as a Hugging Face directory."""


class Config(Section):
    """One run."""

    model: Model
    budget: Budget
    data: Data
    objective: Objective
    sharding: Sharding
    precision: Precision
    optimizer: Optimizer
    schedule: Schedule
    checkpoint: Checkpoint
    tracker: Tracker
    hardware: Hardware
    cluster: Cluster
    evaluation: Evaluation = Evaluation()
    run: Run = Run()
    plan: PlanOptions = PlanOptions()
    nodes: Annotated[int, Field(gt=0, le=10**6)] = 1
    """Machines."""
    gpus_per_node: Annotated[int, Field(gt=0, le=10**4)] = 1
    """Workers per machine, one per GPU; also counts workers on a machine without GPUs."""
    global_batch: Size
    """Sequences per optimizer step over all ranks."""
    micro_batch: Size
    """Sequences per forward pass on one rank."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes of a block: nothing; all but attention and every second matrix
    product; or everything."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""
    log_every_steps: Size = 10
    """Steps between rows of metrics.jsonl."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, of dropout and of the data order."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.gpus_per_node

    @property
    def data_parallel(self) -> int:
        """Copies of the model that see different rows."""
        plan = self.plan
        return self.world_size // (plan.tensor_parallel * plan.pipeline_parallel * plan.context_parallel)

    @property
    def accumulation(self) -> int:
        """Forward passes per rank and optimizer step."""
        return self.global_batch // (self.micro_batch * self.data_parallel)

    @model_validator(mode="after")
    def _check(self) -> Config:
        automatic = self.sharding.strategy == "auto"
        parallel = self.plan.tensor_parallel * self.plan.pipeline_parallel * self.plan.context_parallel
        if self.world_size % parallel:
            raise ValueError(
                f"plan.tensor_parallel x pipeline_parallel x context_parallel = {parallel}: must divide "
                f"nodes x gpus_per_node = {self.world_size}"
            )
        unit = (1 if automatic else self.micro_batch) * (self.world_size // parallel)
        if self.global_batch % unit:
            nearest = max(1, round(self.global_batch / unit)) * unit
            of = "" if automatic else "micro_batch x "
            ranks = "nodes x gpus_per_node" if parallel == 1 else "data-parallel ranks"
            raise ValueError(
                f"global_batch={self.global_batch}: must be a multiple of {of}{ranks} = {unit}, "
                f"for example {nearest}"
            )
        degree = self.sharding.shard_degree
        splitting = self.data_parallel * self.plan.context_parallel
        if degree is not None and (self.sharding.strategy != "hsdp" or splitting % degree):
            raise ValueError(
                f"sharding.shard_degree={degree}: only with sharding=hsdp, and must divide {splitting} ranks"
            )
        second = self.sharding.secondary_degree
        if second is not None and splitting % second:
            raise ValueError(f"sharding.secondary_degree={second}: must divide {splitting} ranks")
        if self.checkpoint.every_steps is None and self.checkpoint.every_minutes is None:
            raise ValueError("checkpoint.every_minutes=null: give checkpoint.every_steps or every_minutes")
        return self
