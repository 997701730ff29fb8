"""The node agent minds its workers, however they behave: here `trainer` is a few badly behaved lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import events
from configs.compose import compose

WORKER = """
import os, signal, sys, time
from pathlib import Path
from cluster.signals import StopNotice, die_with_parent
run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
(run / "workers" / str(os.getpid())).touch()
starts = len(list((run / "workers").iterdir()))

def checkpoint(step):
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "new").symlink_to(f"step-{step:08d}")
    (run / "checkpoints" / "new").replace(run / "checkpoints" / "latest")

def forever():
    (run / f"ready-{rank}").touch()
    while True:
        time.sleep(0.05)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@dataclass
class Node:
    """A run directory, a trainer of a few lines, and the agent that minds it."""

    root: Path
    agents: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.root / "run"

    def start(self, behaviour: str, *overrides: str) -> subprocess.Popen[str]:
        package = self.root / "code" / "trainer"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(WORKER + behaviour)
        (self.run / "workers").mkdir(parents=True)
        config = compose(["gpus_per_node=2", "run.export=false", *overrides])
        (self.run / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
        return self.start_agent()

    def start_agent(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(self.root / "code"), os.environ.get("PYTHONPATH")]))
        agent = subprocess.Popen(
            [sys.executable, "-P", "-m", "cluster.agent", str(self.run)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.agents.append(agent)
        return agent

    def wait(self, seconds: float = 60) -> int:
        """Exit code of the agent, which has to leave no worker behind."""
        code = self.agents[-1].wait(seconds)
        assert self.living() == []
        return code

    def living(self) -> list[int]:
        return [pid for pid in self.workers() if alive(pid)]

    def workers(self) -> list[int]:
        return [int(file.name) for file in (self.run / "workers").iterdir()]

    def ready(self) -> None:
        """Wait until both workers run `forever`."""
        wait_until(lambda: len(list(self.run.glob("ready-*"))) == 2)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [row for row in events.read(self.run / "events.jsonl") if row["event"] == name]

    def event_names(self) -> list[str]:
        return [row["event"] for row in events.read(self.run / "events.jsonl")]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    for agent in node.agents:
        agent.kill()
        agent.communicate()
    for pid in node.living():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("code", [2, 3, 76])
def test_an_end_with_a_meaning_on_one_rank_ends_all_and_is_never_retried(node: Node, code: int) -> None:
    node.start(f"if rank: sys.exit({code})\nforever()")
    assert node.wait() == code
    assert node.event_names() == ["attempt"]
    assert len(node.workers()) == 2


def test_a_crash_tells_rank_and_last_line_and_is_retried_within_the_budget(node: Node) -> None:
    node.start("if rank: raise RuntimeError('the disk is on fire')\nforever()", "cluster.restarts=1")
    assert node.wait() == 77
    assert node.event_names() == ["attempt", "crash", "restart", "crash", "no_progress"]
    crash = node.events("crash")[-1]
    assert (crash["rank"], crash["exit_code"]) == (1, 1)
    assert crash["last_line"] == "RuntimeError: the disk is on fire"
    assert Path(crash["log"]).read_text().count("the disk is on fire\n") == 2


def test_a_crash_explained_by_another_ranks_meaningful_end_is_no_crash(node: Node) -> None:
    behaviour = """
while not rank and not (run / "ready-1").exists():
    time.sleep(0.01)
if not rank:
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
forever()
"""
    node.start(behaviour)
    assert node.wait() == 2
    assert node.events("crash") == []


def test_a_new_checkpoint_renews_the_budget_of_restarts(node: Node) -> None:
    behaviour = """
if starts <= 4:
    checkpoint(starts)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    node.start(behaviour, "cluster.restarts=1", "gpus_per_node=1")
    assert node.wait() == 0
    assert [row["exit_code"] for row in node.events("crash")] == [137] * 4
    assert [row["crashes"] for row in node.events("restart")] == [1] * 4


def test_ranks_may_stop_at_different_times(node: Node) -> None:
    behaviour = """
stop = StopNotice(run)
(run / f"ready-{rank}").touch()
while not stop.requested:
    time.sleep(0.01)
time.sleep(2 * rank)
(run / f"saved-{rank}").touch()
sys.exit(75)
"""
    agent = node.start(behaviour)
    node.ready()
    agent.send_signal(signal.SIGUSR1)
    assert node.wait() == 75
    assert [(node.run / f"saved-{rank}").exists() for rank in (0, 1)] == [True, True]
    assert node.event_names() == ["attempt", "signal"]
    assert node.events("signal")[0]["signal"] == "SIGUSR1"


def test_workers_that_ignore_a_stop_are_killed_after_stop_seconds(node: Node) -> None:
    agent = node.start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nforever()", "cluster.stop_seconds=1")
    node.ready()
    agent.terminate()
    assert node.wait() == 75
    assert node.events("stop_timeout")[0]["seconds"] == 1


def test_a_second_notice_is_passed_on_and_ends_the_workers_now(node: Node) -> None:
    agent = node.start("StopNotice(run)\nforever()", "cluster.stop_seconds=600")
    node.ready()
    agent.terminate()
    wait_until(lambda: node.events("signal"))
    agent.terminate()
    assert node.wait(20) == 75
    assert node.events("stop_timeout") == []


def test_a_second_notice_ends_workers_that_cannot_hear_it(node: Node) -> None:
    agent = node.start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nforever()", "cluster.stop_seconds=600")
    node.ready()
    agent.terminate()
    wait_until(lambda: node.events("signal"))
    agent.terminate()
    assert node.wait(20) == 75


def test_a_failed_rank_takes_along_those_that_ignore_sigterm(node: Node) -> None:
    behaviour = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while rank and not (run / "ready-0").exists():
    time.sleep(0.01)
if rank:
    sys.exit(2)
forever()
"""
    node.start(behaviour)
    assert node.wait() == 2


def test_workers_do_not_outlive_a_killed_agent(node: Node) -> None:
    agent = node.start("die_with_parent()\nforever()")
    node.ready()
    assert len(node.living()) == 2
    agent.kill()
    wait_until(lambda: not node.living(), seconds=5)


def test_a_notice_ends_the_pause_before_a_restart(node: Node) -> None:
    agent = node.start("sys.exit(1)")
    wait_until(lambda: any(row["pause_seconds"] == 4 for row in node.events("restart")))
    agent.terminate()
    assert node.wait(3) == 75


def test_a_run_that_crashes_is_not_restarted_once_a_stop_file_asks_for_its_end(node: Node) -> None:
    node.start("(run / 'STOP').touch(); sys.exit(1)")
    assert node.wait() == 75
    assert len(node.workers()) <= 2


def test_every_worker_learns_its_place_as_torch_names_it(node: Node) -> None:
    node.start("import json; (run / f'{rank}.json').write_text(json.dumps(dict(os.environ)))")
    assert node.wait() == 0
    told = [json.loads((node.run / f"{rank}.json").read_text()) for rank in (0, 1)]
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TRAINYARD_ATTEMPT")
    assert [[place[key] for key in keys] for place in told] == [list("00221"), list("11221")]
    assert told[0]["MASTER_PORT"] == told[1]["MASTER_PORT"]


def test_a_second_agent_takes_the_next_attempt_and_its_own_logs(node: Node) -> None:
    node.start("print('attempt', os.environ['TRAINYARD_ATTEMPT'])")
    assert node.wait() == 0
    node.start_agent()
    assert node.wait() == 0
    logs = [node.run / "logs" / f"attempt-{attempt}" / "rank-1.log" for attempt in (1, 2)]
    assert [log.read_text() for log in logs] == ["attempt 1\n", "attempt 2\n"]


def test_a_run_directory_without_a_configuration_is_one_line_and_exit_2(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "cluster.agent", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(f"trainyard: {tmp_path / 'config.yaml'}: No such file")
    assert len(outcome.stderr.splitlines()) == 1
