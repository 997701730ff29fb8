"""Where agents are started: one module per scheduler."""
