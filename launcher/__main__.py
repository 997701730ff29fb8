"""`python -m launcher` is `trainyard`."""

from launcher.cli import main

main()
