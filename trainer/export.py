"""A checkpoint as a Hugging Face directory: `python -P -m trainer.export RUN [--step N] [--to DIR]`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cluster import events, exit_codes
from cluster.signals import die_with_parent
from cluster.streams import libraries_to_stderr
from configs.load import load
from configs.schema import Config, ConfigError
from trainer.adapters import add_adapters, merge_adapters
from trainer.checkpoint.loading import Found, whole_checkpoint
from trainer.checkpoint.planner import Loading
from trainer.data.tokenizer import DocumentTokenizer, load_tokenizer
from trainer.model import architecture_of, blocks
from trainer.sharding.logical import logical
from trainer.skeleton import materialise

CHECK_TOKENS = 64
MARKER = "trainyard.json"
"""Names run and step of an export; only a directory that has one is replaced."""


def export(run: Path, step: int | None, target: Path) -> Path:
    """Write model, tokenizer and model card of a checkpoint (the newest by default) to `target`.

    The directory is loaded again as a user would, and its logits must equal those of the weights in
    the checkpoint, bit for bit. Raises ConfigError if there is no such whole checkpoint.
    """
    if target.exists() and not (target / MARKER).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to={target}: exists and is not an export, choose another directory")
    config = load(run / "config.yaml")
    found = whole_checkpoint(run, config, step)
    tokenizer = load_tokenizer(config.model)
    model = _model(config, tokenizer, found)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.pretrained.save_pretrained(temporary)
    (temporary / "README.md").write_text(_model_card(run, config, found))
    (temporary / MARKER).write_text(json.dumps({"run": str(run), "step": found.manifest.step}))
    _check(model, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target


def _model(config: Config, tokenizer: DocumentTokenizer, found: Found) -> PreTrainedModel:
    """The trained model, with its adapters merged.

    What training leaves alone (buffers, generation settings) is the parent's.
    """
    model: PreTrainedModel
    if config.model.path is not None:
        model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    else:
        architecture = architecture_of(config.model)
        architecture.eos_token_id = architecture.bos_token_id = tokenizer.end_of_document
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.end_of_document, pad_token_id=tokenizer.end_of_document
        )
    model.eval()
    if config.model.lora_rank is not None:
        add_adapters(model, config.model, blocks(model)[config.model.frozen_blocks :])
        materialise(model, torch.device("cpu"))
    weights = {f"weight/{name}": logical(tensor) for name, tensor in model.named_parameters()}
    reader = found.place.reader(found.manifest)
    load_tensors(weights, storage_reader=reader, planner=Loading(), no_dist=True)
    if config.model.lora_rank is not None:
        merge_adapters(model)
    return model


def _check(model: PreTrainedModel, directory: Path) -> None:
    """Raise RuntimeError unless the directory gives the same logits as the model in memory."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    length = min(CHECK_TOKENS, getattr(model.config, "max_position_embeddings", CHECK_TOKENS))
    inputs = torch.arange(length)[None] * 7919 % model.config.vocab_size
    with torch.no_grad():
        difference = (model(inputs).logits - loaded(inputs).logits).abs().max().item()
    if difference != 0.0:
        raise RuntimeError(f"{directory}: logits differ by {difference} from the checkpoint's")


def _model_card(run: Path, config: Config, found: Found) -> str:
    state = found.place.state(found.manifest)
    total = sum(corpus.weight for corpus in config.data.corpora.values() if corpus.train)
    mixture = [
        f"- {name}: {corpus.weight / total:.1%} of the rows"
        for name, corpus in config.data.corpora.items()
        if corpus.train
    ]
    last: dict[str, float] = {}
    for row in events.read(run / "metrics.jsonl"):
        if row["step"] <= state["step"]:
            last |= {key: value for key, value in row.items() if key.endswith("/perplexity")}
    perplexities = [f"- {key.split('/')[1]}: {value:.2f}" for key, value in last.items()]
    return "\n".join(
        [
            f"# {config.run.name}",
            "",
            f"Parent: {config.model.path or f'none, {config.model.name} from random weights'}.",
            f"Trained with Trainyard for {state['step']:,} steps on {state['tokens']:,} tokens.",
            "",
            "## Data mixture",
            *mixture,
            "",
            "## Perplexity on held-out text",
            *(perplexities or ["Not evaluated."]),
            "",
        ]
    )


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="trainyard export")
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    run: Path = arguments.run
    try:
        with libraries_to_stderr():
            target = export(run, arguments.step, arguments.to or run / "export")
    except ConfigError as error:
        print(f"trainyard: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    events.record(run, "exported", path=str(target))
    print(target)
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
