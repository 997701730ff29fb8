"""`trainyard VERB ...`: the one program that people type."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

from cluster import exit_codes
from configs.load import first_line, load, reason, unknown
from configs.schema import Config, ConfigError
from configs.section import printable
from launcher.programs import checkpoint, config_of, data, export, print_config, sample, tokenize

FOLLOW_SECONDS = 0.2


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        sys.exit(run(sys.argv[1:]))
    except ConfigError as error:
        print(f"trainyard: {error}", file=sys.stderr)
        sys.exit(exit_codes.BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(exit_codes.DONE)
    except OSError as error:
        print(f"trainyard: {printable(reason(error))}", file=sys.stderr)
        sys.exit(exit_codes.MISSING_FROM_ENVIRONMENT)


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code, raises ConfigError for a user's mistake."""
    parser = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise ConfigError(unknown(arguments[0], arguments[0], VERBS).replace("no such key", "no such verb"))
    options, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option
        options.overrides += rest
    if options.verb is None:
        parser.print_help()
        return exit_codes.BAD_INPUT
    code: int = options.action(options)
    return code


def plan(options: argparse.Namespace) -> int:
    """what a run will take: tokens, FLOPs, memory, time and cost, and how to run it best"""
    from launcher.plan import table
    from launcher.plan.plan import make_plan, resolve, too_fast

    config = config_of(options)
    if options.cfg:
        return print_config(config)
    config = resolve(config)
    if options.calibrate:
        from launcher.plan.calibration import calibrate

        return _print_answer(calibrate(config), table.render_values, options.json)
    if options.verify:
        from launcher.plan.verify import verify

        return _print_answer(verify(config), table.render_verified, options.json)
    answer = make_plan(config)
    if impossible := too_fast(answer, config):
        raise ConfigError(impossible)
    if options.figure:
        from launcher.plan.figure import draw

        if not options.figure.suffix or (options.figure.exists() and not options.figure.is_file()):
            raise ConfigError(f"--figure={options.figure}: needs a file name that ends in .png, .svg or .pdf")
        try:
            draw(answer, options.figure)
        except (ValueError, OSError) as error:
            raise ConfigError(f"--figure={options.figure}: {first_line(error)}") from None
    return _print_answer(answer, table.render_explained if options.explain else table.render, options.json)


def train(options: argparse.Namespace) -> int:
    """train on this machine and watch, Ctrl-C saves and stops"""
    config = config_of(options)
    if options.cfg:
        return print_config(config)
    directory, held = _prepare(config)
    with held:
        return _watch_locally(directory)


def launch(options: argparse.Namespace) -> int:
    """submit a run to the cluster and return at once"""
    from launcher.backends import local
    from launcher.freeze import run_directory

    config = config_of(options)
    if options.cfg:
        return print_config(config)
    if options.dry_run:
        checked, _ = _checked(config)
        print(shlex.join(local.supervisor_command(run_directory(checked))))
        return exit_codes.DONE
    directory, held = _prepare(config)
    with held:
        pid, name = local.submit(directory, held), _name(directory)
    print(f"{name}: launched, process {pid}; `trainyard logs -f {name}` follows it")
    return exit_codes.DONE


def resume(options: argparse.Namespace) -> int:
    """go on with a run that was stopped, from its newest checkpoint"""
    from launcher import registry
    from launcher.backends import local

    directory = registry.find(options.run)
    with registry.hold(directory) as held:
        (directory / "STOP").unlink(missing_ok=True)
        if options.detach:
            local.submit(directory, held)
            print(f"{_name(directory)}: resumed; `trainyard logs -f {_name(directory)}` follows it")
            return exit_codes.DONE
        return _watch_locally(directory)


def runs(options: argparse.Namespace) -> int:
    """list runs and their states"""
    from rich.console import Console
    from rich.table import Table

    from launcher import registry

    found = [
        {"name": entry.name, "directory": str(entry.directory)} | registry.status(entry.directory)
        for entry in registry.entries()
    ]
    if options.json:
        print(json.dumps({"runs": found}))
        return exit_codes.DONE
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "loss", "reason", "directory"):
        table.add_column(column, overflow="fold")
    for row in found:
        step = f"{row['step']}/{row['steps']}" if row["steps"] else str(row["step"])
        loss = "" if row["loss"] is None else f"{row['loss']:.3f}"
        table.add_row(row["name"], row["state"], step, loss, row["reason"] or "", row["directory"])
    Console(highlight=False, markup=False).print(table)
    return exit_codes.DONE


def logs(options: argparse.Namespace) -> int:
    """show a run's progress, or a rank's log; -f follows"""
    from launcher import registry
    from launcher.watch import Watch

    directory = registry.find(options.run)
    if options.rank is not None:
        files = list(directory.glob(f"logs/attempt-*/rank-{options.rank}.log"))
        if not files:
            raise ConfigError(f"--rank={options.rank}: no log of this rank in {directory / 'logs'}")
        newest = max(files, key=lambda file: int(file.parent.name.removeprefix("attempt-")))
        return subprocess.run(["tail", "-n", "100", *(["-f"] if options.follow else []), newest]).returncode
    with Watch(directory, from_start=True) as watch:
        watch.tick()
        while options.follow and registry.is_minded(directory):
            time.sleep(FOLLOW_SECONDS)
            watch.tick()
    if options.follow:
        _print_outcome(directory)
    return exit_codes.DONE


def cancel(options: argparse.Namespace) -> int:
    """save and stop a run at its next step; it is not started again"""
    from launcher import registry

    directory = registry.find(options.run)
    if not registry.is_minded(directory):
        raise ConfigError(f"{options.run}: this run is not being trained")
    (directory / "STOP").touch()
    print(f"{_name(directory)}: stops with a checkpoint at its next step")
    return exit_codes.DONE


def report(options: argparse.Namespace) -> int:
    """write RUN/report.html: curves, evaluation, plan against actual"""
    from launcher import registry
    from launcher.report import write_report

    print(write_report(registry.find(options.run)))
    return exit_codes.DONE


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    verb.__name__: verb
    for verb in (
        *(plan, train, launch, resume, runs, logs, cancel, report, sample, export, checkpoint, data),
        tokenize,
    )
}


def _parser() -> Parser:
    parser = Parser(prog="trainyard", description="Plan, dispatch and drive LLM pre-training.")
    parser.set_defaults(verb=None)
    verbs = parser.add_subparsers(metavar="VERB", parser_class=Parser)
    for name, action in VERBS.items():
        verb = verbs.add_parser(name, help=action.__doc__, description=action.__doc__)
        verb.set_defaults(verb=name, action=action)
        if name in ("plan", "train", "launch", "tokenize"):
            _add_config_options(verb)
        elif name == "data":
            actions = verb.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
            text = "shards, documents, tokens, repeats, faults and a row of each corpus"
            inspect = actions.add_parser("inspect", help=text, description=text)
            _add_config_options(inspect)
            inspect.add_argument("--exact", action="store_true", help="read everything instead of a sample")
            inspect.add_argument("--json", action="store_true", help="print one JSON object")
        elif name != "runs":
            if name == "checkpoint":
                verb.add_argument("what", choices=["ls", "verify", "convert"], help="what to do")
            verb.add_argument("run", metavar="RUN", help="a run's name or directory")
        if name in ("plan", "runs", "tokenize"):
            verb.add_argument("--json", action="store_true", help="print one JSON object")
    _add_plan_options(verbs.choices["plan"])
    verbs.choices["launch"].add_argument("--dry-run", action="store_true", help="print, submit nothing")
    verbs.choices["tokenize"].add_argument("--part", default="1/1", metavar="I/N", help="one of N shares")
    verbs.choices["tokenize"].add_argument("--verify", action="store_true", help="only check what is there")
    verbs.choices["resume"].add_argument("--detach", action="store_true", help="return at once")
    verbs.choices["logs"].add_argument("-f", "--follow", action="store_true", help="until the run ends")
    verbs.choices["logs"].add_argument("--rank", type=int, help="the log file of one rank")
    for name, text in (
        ("sample", "--prompt, --tokens, --temperature, ..."),
        ("export", "--step N, --to DIR"),
        ("checkpoint", "--step N, --json; of convert: --to DIR or --from DIR, --layout LAYOUT"),
    ):
        verbs.choices[name].add_argument("rest", nargs=argparse.REMAINDER, metavar="OPTION", help=text)
    return parser


def _add_config_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as model=llama-7b"
    )
    verb.add_argument("--cfg", choices=["job"], help="print the composed configuration and stop")
    verb.add_argument("--config-dir", type=Path, metavar="DIR", help="more YAML groups of your own")


def _add_plan_options(verb: argparse.ArgumentParser) -> None:
    modes = verb.add_mutually_exclusive_group()
    modes.add_argument("--explain", action="store_true", help="formula and source of every number")
    modes.add_argument("--verify", action="store_true", help="trace the real model and compare its memory")
    modes.add_argument("--calibrate", action="store_true", help="measure this machine for later plans")
    verb.add_argument("--figure", type=Path, metavar="FILE", help="draw memory and loss: .png, .svg or .pdf")


def _name(directory: Path) -> str:
    """A run's name, by which the registry knows it."""
    return load(directory / "config.yaml").run.name or directory.name


def _print_answer(answer: dict[str, Any], render: Callable[[dict[str, Any]], Any], as_json: bool) -> int:
    """One JSON object for machines, or tables for people."""
    from rich.console import Console

    if as_json:
        print(json.dumps(answer, allow_nan=False))
    else:
        Console(highlight=False).print(render(answer))
    return exit_codes.DONE


def _prepare(config: Config) -> tuple[Path, IO[str]]:
    """Check, freeze, and enter the run in the registry; returns its directory and the hold on it."""
    from launcher import registry
    from launcher.freeze import create, freeze, run_directory

    config, answer = _checked(config)
    registry.registry_file()
    directory = run_directory(config)
    create(directory)
    held = registry.hold(directory)
    try:
        freeze(config, answer)
        registry.add(_name(directory), directory, config.cluster.kind)
    except BaseException:
        held.close()
        raise
    return directory, held


def _checked(config: Config) -> tuple[Config, dict[str, Any]]:
    """The run with its name and directory, and its plan; what cannot run or fit is refused."""
    from launcher.freeze import check_local_paths, check_unused, run_directory, with_defaults
    from launcher.plan.plan import make_plan, refusal, resolve
    from launcher.plan.runnable import why_not

    if reason := why_not(config):
        raise ConfigError(reason)
    if config.cluster.kind == "local":
        if config.nodes > 1:
            raise ConfigError(f"nodes={config.nodes}: cluster=local is one machine, give nodes=1")
        check_local_paths(config)
    config = resolve(config)
    answer = make_plan(config)
    if refused := refusal(answer, config):
        raise ConfigError(refused)
    if answer["memory"]["verdict"] == "tight":
        print(f"trainyard: memory is tight: needs {answer['memory']['shortage']}", file=sys.stderr)
    config = with_defaults(config)
    check_unused(run_directory(config))
    return config, answer


def _watch_locally(directory: Path) -> int:
    from launcher.backends import local
    from launcher.watch import Watch

    with Watch(directory) as watch:
        code = local.supervise(directory, watch.tick)
    _print_outcome(directory, code)
    return code


def _print_outcome(directory: Path, code: int | None = None) -> None:
    """The last line of a run: what it came to, and what to do next. A full disk may have lost its end."""
    from launcher import registry

    status = registry.status(directory)
    if code is not None:
        status["state"] = registry.STATES.get(code, "failed")
    why = f": {status['reason']}" if status["reason"] else ""
    hint = f"; `trainyard resume {directory}` continues it" if status["state"] == "stopped" else ""
    line = f"trainyard: {directory}: {status['state']} at step {status['step']}{why}{hint}"
    with contextlib.suppress(OSError):  # the terminal may be gone, the exit code is not
        print(line, file=sys.stderr)
