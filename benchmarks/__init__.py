"""Paired comparisons of ``lianlian_async`` with the programs that one would otherwise write: see ``--help``.

Read the medians of paired ratios: absolute figures depend on the machine and the moment. Each round runs
every program once, one after the other, in fresh processes; a case has at most one loopback server process.
"""
