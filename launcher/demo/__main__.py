"""`make demo`: the main job on this machine, with the commands a user would type.

Everything is written to ./demo; the corpora are kept for the next time, the runs are made anew.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster import events
from launcher.demo.corpora import build
from launcher.report import summary

ROOT = Path("demo")
BASE, LEGAL = ROOT / "base", ROOT / "legal"
PROMPT = "This License does not"
console = Console(highlight=False)


def main() -> int:
    began = time.monotonic()
    _heading("1. Two corpora from text on this machine, and a tokenizer")
    for name, counts in build(ROOT).items():
        sizes = f"{counts['documents']} documents, {counts['characters']:,} characters"
        console.print(f"{name}: {sizes}, {counts['shards']} shards of C4 shape")
    for run in (BASE, LEGAL):
        shutil.rmtree(run, ignore_errors=True)

    _heading("2. The plan for the base model")
    _trainyard("plan", "experiment=demo_base")
    _heading("3. A base model from scratch on general text, two processes")
    _trainyard("train", "experiment=demo_base")
    _heading("4. It goes on with legal text and 30 % general replay, launched as on a cluster")
    _trainyard("launch", "experiment=demo_legal")
    console.print("5. In the middle its node agent gets SIGTERM, as from a scheduler that wants the node.")
    threading.Thread(target=_preempt_once, args=(LEGAL,), daemon=True).start()
    _trainyard("logs", "-f", str(LEGAL))

    _heading("6. What it came to")
    _perplexities()
    for name, run in (("base", BASE), ("legal", LEGAL)):
        console.print(f"\n[bold]{name} model[/bold]:")
        _trainyard("sample", str(run), "--prompt", PROMPT, "--tokens", "40")
    console.print(f"\nHugging Face model  {LEGAL / 'export'}")
    console.print(f"Report              {LEGAL / 'report.html'}")
    console.print(f"W&B, offline        {LEGAL / 'wandb'} (`wandb sync` sends it)")
    console.print(f"Metrics and events  {LEGAL / 'metrics.jsonl'}, {LEGAL / 'events.jsonl'}")
    console.print(f"\nDone in {time.monotonic() - began:.0f} seconds.")
    return 0


def _heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


def _trainyard(*arguments: str) -> None:
    """Run a command as typed; the demo ends with it if it fails."""
    console.print(f"[dim]$ trainyard {' '.join(arguments)}[/dim]")
    code = subprocess.run([sys.executable, "-P", "-m", "launcher", *arguments]).returncode
    if code:
        sys.exit(code)


def _preempt_once(run: Path) -> None:
    """Send SIGTERM to the node agent when half of the steps are done."""
    while True:
        time.sleep(0.2)
        found = {event["event"]: event for event in events.read(run / "events.jsonl")}
        rows = list(events.read(run / "metrics.jsonl"))
        if "training" in found and rows and rows[-1]["step"] >= found["training"]["steps"] // 2:
            os.kill(found["attempt"]["agent_pid"], signal.SIGTERM)
            return


def _perplexities() -> None:
    table = Table("held-out text", "before", "after", "change", box=None, pad_edge=False)
    for corpus, values in summary(LEGAL)["perplexity"].items():
        before, after = values["before"], values["after"]
        table.add_row(corpus, f"{before:.1f}", f"{after:.1f}", f"{after / before - 1:+.0%}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
