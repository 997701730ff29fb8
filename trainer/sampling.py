"""Text from a run's export: `python -P -m trainer.sampling DIR --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from cluster.streams import libraries_to_stderr


def sample(
    directory: Path, prompt: str, tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> str:
    """Continue a prompt by up to `tokens` tokens; temperature 0 takes the likeliest each time."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(seed)
    choice = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False}
    )
    output = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=tokens, **choice
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def main() -> int:
    disable_progress_bar()
    parser = argparse.ArgumentParser(prog="trainyard sample")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with libraries_to_stderr():
        text = sample(**vars(arguments))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
