"""Everything a run holds between its first and its last step, and what it does besides training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster import events
from configs.schema import Config, ConfigError
from trainer.checkpoint.store import Store
from trainer.corpora import load_corpora, steps_of
from trainer.data.damage import DamageReport
from trainer.data.decontaminate import Decontamination
from trainer.data.loader import Batch, Loader, Position
from trainer.distributed import World
from trainer.evaluation import Rows, perplexities
from trainer.initial import fill, initial_weights
from trainer.model import build_model, flops_per_token
from trainer.rehearsal import check_documents, pass_on_zeros
from trainer.sharding import Progress, Strategy, shard
from trainer.throughput import Throughput
from trainer.tracking import Metrics


class Diverged(RuntimeError):
    """Loss or gradient norm is not a finite number; such weights are never saved."""


@dataclass
class Session:
    """A run in progress, at the boundary between two steps."""

    run: Path
    config: Config
    world: World
    steps: int
    """Steps of the whole run."""
    step: int
    """Steps done."""
    tokens: int
    """Target tokens trained on so far."""
    end_of_document: int | None
    """Token that ends documents, if attention is not to reach beyond it."""
    fingerprints: dict[str, Any]
    """What decides the order of the data, see Corpora."""
    damage: DamageReport
    """What was skipped in the text."""
    decontamination: Decontamination | None
    began: Position
    """How far the data had been consumed when this attempt began."""
    module: nn.Module
    strategy: Strategy
    loader: Loader
    validation: dict[str, Rows]
    store: Store
    metrics: Metrics | None
    """Only on rank 0."""
    throughput: Throughput
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Global norm of the last step's gradient, before clipping."""
    skipped: bool = False
    """Whether the last step's gradient overflowed in fp16, so that it changed nothing."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Results of the newest evaluation, and the step that it was made at."""
    epochs: dict[str, int] = field(default_factory=dict)
    """Times that each corpus was read to its end, as far as told."""
    batch: Batch | None = None
    """The one that was consumed last."""
    saved_step: int = 0
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def position(self) -> Position:
        """How far the data has been consumed; worked out from hundreds of lanes, so not at every step."""
        return self.began if self.batch is None else self.batch.position

    @property
    def save_is_due(self) -> bool:
        """Whether a checkpoint is due by this rank's clock, or the one before failed, which saving tells.

        Ranks agree on it before they save.
        """
        if self.store.failed:
            return True
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def next_batch(self, give_up: Callable[[], bool]) -> Batch | None:
        """This rank's rows of the next global batch; waiting for them is booked as data time.

        None if they are slow to come and `give_up` says so.
        """
        began = time.perf_counter()
        batch = self.loader.next_batch(give_up)
        self.throughput.data_seconds += time.perf_counter() - began
        return batch

    def stepped(self, grad_norm: Tensor, batch: Batch, tokens: int) -> None:
        """Take note of a step on a batch with so many target tokens.

        Raises Diverged if fp16 gradients overflow even without a loss scale.
        """
        self.step, self.batch, self.grad_norm = self.step + 1, batch, grad_norm
        self.tokens += tokens
        self.throughput.add_step(tokens)
        loss_scale = self.strategy.progress().loss_scale
        self.skipped = loss_scale is not None and not math.isfinite(grad_norm.item())
        if loss_scale is not None and self.skipped:
            if self.world.main:
                events.record(self.run, "step_skipped", step=self.step, loss_scale=loss_scale)
            self._check("loss_scale", loss_scale, least=1.0)

    def _tell_epochs(self) -> None:
        """Record that corpora began again; their first lanes stand for all, which differ by a few rows."""
        if not self.world.main:  # which reads some rows of every first lane
            return
        for (corpus, lane), mark in self.position.marks.items():
            if lane == 0 and mark.epoch > self.epochs.get(corpus, 0):
                self.epochs[corpus] = mark.epoch
                events.record(self.run, "epoch", step=self.step, corpus=corpus, epoch=mark.epoch)

    def log_step(self, loss: float, lr: float) -> None:
        """Write a row of metrics. Raises Diverged instead if loss or gradient norm is not finite."""
        self._tell_epochs()
        norm = self.grad_norm.item()
        if not self.skipped:
            self._check("loss", loss)
            self._check("grad_norm", norm)
        row = {"loss": loss if math.isfinite(loss) else None, "lr": lr}
        row["grad_norm"] = None if self.skipped else norm
        self._log(row | self.throughput.row())
        self.throughput.restart()

    def evaluate(self) -> None:
        """Perplexity of every corpus that has held-out text."""
        self.module.eval()
        results = perplexities(
            self.strategy.logits, self.validation, self.config, self.world, self.end_of_document
        )
        self.module.train()
        if results:
            self._log(results)
            self.evaluation = {"step": self.step} | results
        self.throughput.restart()

    def save(self) -> None:
        """Write a checkpoint, or begin to. Raises Diverged if the last gradient was not finite, and NoSpace
        or another error of a disk for this checkpoint or for the one before."""
        self._check("grad_norm", 0.0 if self.skipped else self.grad_norm.item())
        position = Position.merged(self.world.gather(self.position))
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "data": position.to_json() | {"fingerprints": self.fingerprints},
            "progress": asdict(self.strategy.progress()),
            "evaluation": self.evaluation,
        }
        self.store.save(self.step, self.strategy.state(), state)
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.throughput.restart()

    def close(self, reason: str | None) -> None:
        """End a run that is done, or stopped for a reason, once its last checkpoint is durable."""
        self.store.close()
        self.loader.close()
        if self.damage.skipped:
            events.record(self.run, "skipped", rank=self.world.rank, **self.damage.skipped)
        if self.decontamination is not None:
            for corpus, reasons in self.decontamination.dropped().items():
                events.record(self.run, "decontaminated", rank=self.world.rank, corpus=corpus, **reasons)
        if self.metrics is not None:
            self.metrics.close()
        if self.world.main:
            outcome = {"reason": reason} if reason else {}
            events.record(self.run, "stopped" if reason else "finished", step=self.step, **outcome)

    def _log(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.log({"step": self.step, "tokens": self.tokens} | row)

    def _check(self, name: str, value: float, least: float = -math.inf) -> None:
        """Raise Diverged unless a number is finite and large enough."""
        if math.isfinite(value) and value >= least:
            return
        if self.world.main:
            events.record(self.run, "diverged", step=self.step, quantity=name, value=str(value))
        raise Diverged(f"step {self.step}: {name} is {value}")


def open_session(run: Path, config: Config, world: World, attempt: int) -> Session:
    """Build model, data and strategy, and take up the newest checkpoint if there is one.

    Raises ConfigError for a user's mistake, in one line.
    """
    corpora = load_corpora(run, config, world)
    module = build_model(config, corpora.tokenizer.vocabulary, corpora.tokenizer.end_of_document)
    throughput = Throughput(config, world, flops_per_token(module, config.model.sequence_length))
    strategy = shard(module, config, world)
    _check_metric(config, list(corpora.validation))
    store = Store(run, world, attempt, config.sharding.strategy, config.checkpoint, config.run.name or "")
    saved = store.load(strategy.state())
    if saved is None:
        fill(strategy.state(), initial_weights(module, config))
    # Older checkpoints do not say how many updates there were.
    strategy.loaded(Progress(**saved.get("progress") or {"updates": saved["step"]}) if saved else Progress())
    _rehearse(strategy, config, world)
    step = saved["step"] if saved else 0
    position = Position.from_json(saved["data"]) if saved else Position(0, {})
    if saved is not None and position.rows:
        check_order(saved["data"].get("fingerprints") or {}, corpora.fingerprints)
    session = Session(
        run=run,
        config=config,
        world=world,
        steps=steps_of(config, corpora),
        step=step,
        tokens=saved["tokens"] if saved else 0,
        end_of_document=corpora.tokenizer.end_of_document if config.objective.mask_documents else None,
        fingerprints=corpora.fingerprints,
        damage=corpora.damage,
        decontamination=corpora.decontamination,
        began=position,
        module=module,
        strategy=strategy,
        loader=Loader(
            config,
            corpora.train,
            rank=world.rank,
            world_size=world.size,
            position=position,
        ),
        validation=corpora.validation,
        store=store,
        metrics=Metrics(run, config, step if saved else -1) if world.main else None,
        throughput=throughput,
        evaluation=(saved or {}).get("evaluation") or {},
        epochs={corpus: cursor.epoch for (corpus, lane), cursor in position.cursors.items() if lane == 0},
        saved_step=step,
    )
    if world.main:
        events.record(run, "training", step=step, steps=session.steps, world_size=world.size)
    if saved is None:
        session.evaluate()
    return session


def check_order(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError naming the first key by which the rows after a checkpoint would be others."""
    for key in [*now, *then]:
        if then.get(key) != now.get(key):
            shown = f"{key}={now.get(key)}"
            raise ConfigError(f"{shown}: the checkpoint's rows follow from {then.get(key)}; start a new run")


def _check_metric(config: Config, validation: list[str]) -> None:
    """Raise ConfigError for a metric that no evaluation will have."""
    metrics = [f"eval/{name}/{kind}" for name in validation for kind in ("loss", "perplexity")]
    if config.checkpoint.keep_best not in (None, *metrics):
        known = ", ".join(metrics) or "none, no corpus has held-out text"
        raise ConfigError(
            f"checkpoint.keep_best={config.checkpoint.keep_best}: no such metric; known: {known}"
        )


def _rehearse(strategy: Strategy, config: Config, world: World) -> None:
    """Forward and backward passes on zeros before any data flows.

    What does not fit in memory fails here. DDP orders its gradient buckets anew after its first backward
    pass, with a static graph after its second; with two behind them, a fresh and a resumed run sum in the
    same order, bit for bit.
    """
    for _ in range(2):
        pass_on_zeros(strategy, config, world)
        strategy.discard_gradients()
    check_documents(strategy, config, world)
