"""On the machines: the node agent, rank discovery, signals and exit codes."""
