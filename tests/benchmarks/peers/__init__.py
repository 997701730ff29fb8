"""Pipelines from C4-shaped shards to rows of tokens: ours, written by hand, and those of other libraries.

Each module has functions that take a Task and yield arrays of rows for ever. They are run in processes of
their own (stream_worker.py), so each module imports only what its own pipelines need; none but `ours`
imports Trainyard.
"""
