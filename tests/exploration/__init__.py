"""Explicit-state exploration: every interleaving of a bounded model that calls the library's pure functions.

The model has one refund, one journal entry, one or two workers, and a slow gateway that carries out every request.
It simulates the scheduler, the network, the clocks and crashes; the library's own functions decide what the journal
writes and what a worker concludes. ``python -m tests.exploration`` prints the results. ``python -m
tests.exploration.spin`` prints those of a second model, in Promela, which shares no code with the first.
"""
