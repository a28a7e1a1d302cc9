"""Paired comparisons of ``lianlian_async`` with what one would otherwise write: ``python -m benchmarks --help``.

Absolute figures belong to a machine and a moment; the medians of paired ratios are what to read. Each round runs
every program once, one after the other, in fresh processes, against one loopback server process.
"""
