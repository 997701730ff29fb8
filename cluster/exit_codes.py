"""Exit codes of all programs: agent, worker, command line and batch scripts read the same table."""

DONE = 0
CRASH = 1
"""Ended by something that may have passed by the next attempt: retried within a budget."""
BAD_INPUT = 2
"""Bad input or configuration. Never retried."""
MISSING_FROM_ENVIRONMENT = 3
"""The environment lacks something: a scheduler's program, credentials, disk space. Not retried."""
REQUEUE = 75
"""Stopped with a durable checkpoint; please schedule again."""
UNHEALTHY_NODE = 76
"""This node cannot train; please schedule elsewhere."""
NO_PROGRESS = 77
"""Several tries in a row brought no new checkpoint; stop retrying."""

FINAL = frozenset({DONE, BAD_INPUT, MISSING_FROM_ENVIRONMENT, REQUEUE, UNHEALTHY_NODE, NO_PROGRESS})
"""Codes with a meaning. Any other end is a crash, retried within a budget."""
