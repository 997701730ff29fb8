"""Keys about text: corpora, their mixture, the order of rows, reading, tokens.

A part of schema.py, in a file of its own for its length.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from configs.section import Name, Paths, Section, Size, Text, Tokens

Weight = Annotated[float, Field(ge=1e-9, le=1e15)]
Policy = Literal["skip", "fail"]


class Corpus(Section):
    """One source of documents."""

    train: Paths = None
    """Shards: paths, globs or fsspec addresses of .json, .jsonl, .txt (a document per line; all three plain,
    .gz or .zst) or .parquet files, or @FILE, a list of them, one per line; none means that the corpus is
    only evaluated."""
    validation: Paths = None
    """Held-out shards, in the same forms; none means no evaluation on this corpus."""
    weight: Weight = 1.0
    """Share of rows drawn from this corpus, relative to the other corpora."""
    text_field: Text = "text"
    """Field of a document that holds its text; unused for .txt."""


class Stage(Section):
    """A range of the run with a mixture of its own."""

    until_tokens: Tokens | None = None
    """Tokens of the run at which the stage ends, padding and masked targets included; none only in the last
    stage, which has no end."""
    weights: Annotated[dict[Name, Weight], Field(min_length=1)]
    """Weights of the corpora that are drawn from; those not named rest."""


class Faults(Section):
    """What a fault in the text does: skip it with an event that names shard and place, or end the run."""

    document: Policy = "skip"
    """A document with bad JSON, bad UTF-8 or without its text field."""
    shard: Policy = "skip"
    """A shard that is empty, cut short or damaged from a place on; skip goes on with the next shard."""
    changed: Policy = "fail"
    """A shard with another size or ETag than when the run began."""
    store: Policy = "fail"
    """A shard that cannot be read after all attempts, or is gone. Skipping it loses its text until the run is
    started again, and the order of what follows in its lanes then depends on the outage."""


class Retry(Section):
    """How patiently a store is read."""

    attempts: Size = 6
    """Times that a read is tried; the pause doubles from half a second to 30 seconds, with jitter."""
    timeout_seconds: PositiveFloat = 30.0
    """Longest wait for one read from a store; a local file is waited for as long as it takes."""
    stall_seconds: Annotated[float, Field(gt=0, le=540)] = 300.0
    """Longest wait of the training loop for a batch, less than the time-out of collective operations; then
    the run fails and says what was being read."""

    @model_validator(mode="after")
    def _check(self) -> Retry:
        pauses = sum(min(0.5 * 2.0**number, 30.0) for number in range(min(self.attempts, 1000) - 1))
        patience = self.attempts * self.timeout_seconds + pauses
        if patience >= self.stall_seconds:
            raise ValueError(
                f"data.retry.stall_seconds={self.stall_seconds:g}: must be more than "
                f"attempts x timeout_seconds and the pauses between = {patience:g}"
            )
        return self


class Cache(Section):
    """Local copies of remote shards, shared by the ranks of a machine."""

    directory: Text | None = None
    """Where copies lie; none streams remote shards without keeping them."""
    gib: PositiveFloat = 50.0
    """Most that copies take; those read longest ago go first."""


class Data(Section):
    """Text, its mixture and its order."""

    corpora: dict[Name, Corpus]
    """Corpora by name; at least one has train shards."""
    temperature: PositiveFloat = 1.0
    """Flattens the mixture: shares are proportional to weight ** (1 / temperature)."""
    stages: Annotated[list[Stage], Field(default_factory=list)]
    """Ranges of the run with mixtures of their own, in order; none means the corpora's weights throughout."""
    lanes: Size = 16
    """Independent streams the rows are dealt from; part of the order, so fixed for a run."""
    shuffle_window: Size = 256
    """Documents that are shuffled as one block."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents become rows: concatenate joins and cuts them; best_fit cuts none that fits in a row, and
    pads (Ding et al. 2024)."""
    engine: Literal["auto", "transformers", "fastokens"] = "auto"
    """What tokenizes; auto takes fastokens if it is installed and gives the same ids as transformers."""
    tokenized: Text | None = None
    """Directory of tokenized corpora: `trainyard tokenize` writes it, training reads it instead of text."""
    decontaminate: Literal["none", "exact", "ngram"] = "none"
    """Which training documents are dropped: those equal to a held-out document, or those that share 13
    words in a row with one as well."""
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    """Threads of a rank that read and tokenize ahead; 0 does it in the thread that packs, as for tokenized
    corpora."""
    prefetch_batches: Size = 8
    """Batches a rank prepares ahead of the loop; as many more are under way."""
    faults: Faults = Faults()
    retry: Retry = Retry()
    cache: Cache = Cache()

    @model_validator(mode="after")
    def _check(self) -> Data:
        trained = [name for name, corpus in self.corpora.items() if corpus.train]
        if not trained:
            raise ValueError("data.corpora: nothing to train on, give data.corpora.NAME.train=GLOB")
        ended = 0
        for number, stage in enumerate(self.stages):
            key, last = f"data.stages[{number}]", number == len(self.stages) - 1
            if unknown := [name for name in stage.weights if name not in trained]:
                known = ", ".join(trained)
                raise ValueError(f"{key}.weights={unknown[0]}: no corpus with train shards; known: {known}")
            if (stage.until_tokens is None) != last:
                needed = "must be null in the last stage" if last else "needs a number of tokens"
                raise ValueError(f"{key}.until_tokens={stage.until_tokens}: {needed}")
            if stage.until_tokens is not None and stage.until_tokens <= ended:
                raise ValueError(f"{key}.until_tokens={stage.until_tokens}: must be more than {ended}")
            ended = stage.until_tokens or 0
        return self
