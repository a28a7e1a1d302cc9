"""The programs that the cases compare, by the names that tables and charts show."""

from __future__ import annotations

from dataclasses import replace

from .programs.frame import Job
from .runner import Program

NAIVE = "naive: httpx + pycryptodome inline"
PLAIN = "httpx + OpenSSL inline"
THREADS = "requests + threads + OpenSSL"
AIOHTTP = "raw aiohttp + OpenSSL, no checks"
CORE = "ours, four dependencies"
FAST = "ours, with `fast`"
FLOOR = "the parts' sum"
OURS = (CORE, FAST)


def program(label: str, job: Job) -> Program:
    """The program behind a name, doing ``job``."""
    openssl = {"LIANLIAN_SIGNING_BACKEND": "openssl"}
    return {
        NAIVE: Program("httpx_inline", job, core=True),
        PLAIN: Program("httpx_inline", replace(job, option="openssl")),
        THREADS: Program("requests_threads", job),
        AIOHTTP: Program("aiohttp_unchecked", job),
        CORE: Program("ours", job, core=True),
        FAST: Program("ours", job, env=openssl),
        FLOOR: Program("parts", job),
    }[label]
