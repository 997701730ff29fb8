"""What will it take: parameters, tokens, FLOPs, memory and time, before anyone pays for a GPU."""
