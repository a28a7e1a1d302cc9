"""One import, timed: option ``library``, or ``dependencies``, what the library uses of its four."""

from __future__ import annotations

from . import frame


def program(job: frame.Job) -> dict[str, float]:
    began = frame.clocks()
    if job.option == "library":
        import lianlian_async  # noqa: F401
    else:
        import anyio  # noqa: F401
        import attrs  # noqa: F401
        import httpx  # noqa: F401
        from Crypto.Hash import MD5, SHA256  # noqa: F401
        from Crypto.PublicKey import RSA  # noqa: F401
        from Crypto.Signature import pkcs1_15  # noqa: F401
    return frame.timed(1, began)


if __name__ == "__main__":
    frame.main(program)
