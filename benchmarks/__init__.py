"""Side-by-side runs against the peers, and cost as work grows. `python -m benchmarks --help` says how to run them.

Nothing here is a timed test: a result is the ratio of runs taken in turn on one machine, the median of several rounds.
"""
