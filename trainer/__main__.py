"""One worker: `python -P -m trainer RUN`, started by the node agent with torch's variables set."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

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

    from trainer.checkpoint.store import NoSpace
    from trainer.distributed import World
    from trainer.loop import train
    from trainer.session import open_session

    world = World.join()
    try:
        attempt = int(os.environ["TRAINYARD_ATTEMPT"])
        code = train(open_session(run, load(run / "config.yaml"), world, attempt), stop)
    except (ConfigError, NoSpace) as error:
        code = exit_codes.BAD_INPUT if isinstance(error, ConfigError) else exit_codes.MISSING_FROM_ENVIRONMENT
        text = error.strerror if isinstance(error, NoSpace) else str(error)
        print(f"trainyard: {text}", file=sys.stderr, flush=True)
        events.record(run, "failed", rank=world.rank, exit_code=code, message=text)
        os._exit(code)
    world.leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
