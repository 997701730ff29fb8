"""The training loop."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from cluster import exit_codes
from cluster.signals import StopNotice
from trainer import objective
from trainer.schedule import learning_rate
from trainer.session import Session


def train(session: Session, stop: StopNotice) -> int:
    """Train until the budget is spent or a stop is asked for; returns an exit code.

    Whatever happens, the newest checkpoint under RUN/checkpoints is whole.
    """
    config, world, strategy = session.config, session.world, session.strategy
    upcast, masked = config.objective.logits == "fp32", session.end_of_document
    session.throughput.restart()
    while session.step < session.steps:
        batch = session.next_batch(give_up=lambda: stop.requested)
        # The only thing ranks tell each other on the host: once a step, so that all stop and save together.
        own_tokens = 0 if batch is None else objective.target_tokens(batch.rows, masked)
        tokens, stopping, saving = world.sum(own_tokens, stop.requested, session.save_is_due)
        if batch is None or stopping:
            break
        rows = world.to_device(torch.from_numpy(batch.rows).long())
        inputs, targets, positions = objective.causal(rows, masked)
        seed_step(config.seed, session.step, world.rank)
        lr = learning_rate(session.step, session.steps, config.optimizer.lr, config.schedule)
        loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        for start in range(0, len(rows), config.micro_batch):
            micro = slice(start, start + config.micro_batch)
            with strategy.gradients(complete=micro.stop >= len(rows)):
                # Not named here: a name would keep the logits, often the largest tensor, through backward.
                own = None if positions is None else positions[micro]
                loss = objective.loss_sum(strategy.logits(inputs[micro], own), targets[micro], upcast=upcast)
                # Ranks' gradients are averaged: times world size, over all target tokens, is the mean.
                strategy.backward(loss * (world.size / tokens))
            loss_sum += loss.detach()
        session.stepped(strategy.step(lr), batch, tokens)

        last = session.step == session.steps
        if last or _every(config.log_every_steps, session.step):
            dist.all_reduce(loss_sum)
            session.log_step(loss_sum.item() / tokens, lr)
        if last or _every(config.evaluation.every_steps, session.step):
            session.evaluate()
        if last or saving or _every(config.checkpoint.every_steps, session.step):
            session.save()
    stopped = session.step < session.steps
    if session.saved_step < session.step:
        session.save()
    session.close((stop.reason or "another rank") if stopped else None)
    return exit_codes.REQUEUE if stopped else exit_codes.DONE


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers (dropout) are a function of seed, step and rank, so none have to be saved."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _every(cadence: int | None, step: int) -> bool:
    return cadence is not None and step % cadence == 0
