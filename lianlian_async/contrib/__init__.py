"""Integrations with frameworks and other libraries. Import the module of the one that you use.

Synchronous programs (Flask, Celery, scripts) run the session in an event loop in another thread. Open it once in each
process, after a fork (``post_fork`` of gunicorn, ``worker_process_init`` of Celery), and call it from any thread::

    import os
    from contextlib import contextmanager
    from anyio.from_thread import start_blocking_portal

    @contextmanager
    def synchronous(session):
        process = os.getpid()

        def call(function, *arguments):               # call(session.apply_refund, request)
            if os.getpid() != process:
                raise RuntimeError("the RefundSession was opened before a fork: open one in each process")
            return portal.call(function, *arguments)

        with start_blocking_portal() as portal, portal.wrap_async_context_manager(session):
            yield call
"""
