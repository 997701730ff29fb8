from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support import Site, write_tokenizer

from trainer.data.tokenizer import DocumentTokenizer

# The same examples every time, and no stopwatch: a busy machine must not fail a test.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

TABLES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tables"] = session.config.stash[TABLES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What one of several processes that share the tests has to show."""
    node.config.stash[TABLES] += getattr(node, "workeroutput", {}).get("tables", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for table in config.stash[TABLES]:
        terminalreporter.write_line(f"\n{table}")


@pytest.fixture(scope="session")
def show(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Prints a table below the tests' outcome."""
    return pytestconfig.stash[TABLES].append


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither this user's registry nor calibrations of this machine may change what tests see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A user's directory with corpora, tokenizer and the overrides of a small run."""
    return Site.create(tmp_path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> DocumentTokenizer:
    """A small byte-level tokenizer, loaded."""
    from transformers import AutoTokenizer

    directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return DocumentTokenizer(AutoTokenizer.from_pretrained(directory), "model.tokenizer")
