"""The time of one import: option ``library``, or option ``dependencies`` (the parts of them that the library uses).

The timed import comes before this program's own imports, so that nothing it needs is already loaded.
"""

import sys
import time

began = time.perf_counter(), time.process_time()
if '"option": "library"' in sys.argv[1]:
    import lianlian_async

    for name in lianlian_async.__all__:  # each is imported when it is first used
        getattr(lianlian_async, name)
else:
    import anyio.lowlevel
    import anyio.to_thread
    import attrs  # noqa: F401
    import httpx  # noqa: F401
    from Crypto.Hash import MD5, SHA256  # noqa: F401
    from Crypto.PublicKey import RSA  # noqa: F401
    from Crypto.Signature import pkcs1_15  # noqa: F401

    _ = anyio.CancelScope, anyio.Semaphore  # anyio loads its parts when they are first asked for
ended = time.perf_counter(), time.process_time()

from . import frame  # noqa: E402


def program(job: frame.Job) -> dict[str, float]:
    return frame.figures(1, began, ended)


if __name__ == "__main__":
    frame.main(program)
