"""A deterministic simulation: many nodes, one gateway and one network on one seeded scheduler, over the real package.

Read ``world`` first (the scheduler and its event loops), then ``node`` (what runs on them), ``network`` and
``gateway`` (what they talk to), ``journals`` (PostgreSQL: ``database``, and ``connections`` to it), ``oracle``
(the invariants), ``plan`` (what a seed decides) and ``run``.

None of simloom, simloop and seedloop is used: all three need Python 3.12, refuse real threads, which
``anyio.to_thread`` starts without asking the event loop, and have one event loop for all, so that no node can be
suspended or killed alone.
"""
