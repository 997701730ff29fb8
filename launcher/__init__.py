"""Before and around a run: command line, plan, freeze, backends, registry, report. Never imports torch."""
