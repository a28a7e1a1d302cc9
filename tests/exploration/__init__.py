"""Explicit-state exploration: every interleaving of a bounded model whose steps are the library's pure code.

One refund, one journal entry, one or two workers, a gateway that carries out whatever arrives and is late. The
scheduler, the network, the clocks and the crashes are the model's; what the journal writes and what a worker
concludes are the library's own functions. ``python -m tests.exploration`` prints the table. ``python -m
tests.exploration.spin`` prints that of a second model, in Promela, which shares no code with the first.
"""
