"""A deterministic simulation: many nodes, one gateway and one network on one seeded scheduler, over the real package.

Read ``world`` first (the scheduler and its event loops), then ``node`` (what runs on them), ``network`` and
``gateway`` (what they talk to), ``journals`` (PostgreSQL: ``database``, and ``connections`` to it), ``oracle``
(the invariants), ``plan`` (the parameters that a seed determines) and ``run``.

simloom, simloop and seedloop are not used: all three need Python 3.12, reject the real threads that
``anyio.to_thread`` starts, and run everything on one event loop, so a single node cannot be suspended or killed.
"""
