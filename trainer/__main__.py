"""One worker: `python -P -m trainer RUN`, started by the node agent with torch's variables set."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from cluster import events, exit_codes
from cluster.signals import StopNotice, die_with_parent
from configs.load import load
from configs.schema import ConfigError


def main() -> int:
    die_with_parent()
    run = Path(sys.argv[1])
    stop = StopNotice(run)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    from trainer.data.damage import Unavailable
    from trainer.distributed import World
    from trainer.loop import train
    from trainer.session import open_session

    world = World.join()
    try:
        attempt = int(os.environ["TRAINYARD_ATTEMPT"])
        session = open_session(run, load(run / "config.yaml"), world, attempt)
        try:
            code = train(session, stop)
        finally:  # an interpreter that ends beside its threads would abort, and hide why
            session.loader.close()
    except ConfigError as error:
        _end(run, world.rank, exit_codes.BAD_INPUT, str(error))
    except Unavailable as error:
        _end(run, world.rank, exit_codes.CRASH, str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end(run, world.rank, exit_codes.MISSING_FROM_ENVIRONMENT, error.strerror or "no space left")
    world.leave()
    return code


def _end(run: Path, rank: int, code: int, message: str) -> NoReturn:
    """Tell why and leave at once: other ranks may be waiting for this one in a collective."""
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        print(f"trainyard: {message}", file=sys.stderr, flush=True)
    events.record(run, "failed", rank=rank, exit_code=code, message=message)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
