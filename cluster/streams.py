"""Standard output belongs to a program's result."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, redirect_stdout
from typing import TextIO


def libraries_to_stderr() -> AbstractContextManager[TextIO]:
    """While this lasts, what libraries print goes to standard error.

    transformers imports DeepSpeed wherever accelerate is installed, and DeepSpeed logs to standard output.
    """
    return redirect_stdout(sys.stderr)
