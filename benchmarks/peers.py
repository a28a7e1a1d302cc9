"""The programs that the cases compare, by the names that tables and charts show."""

from __future__ import annotations

from dataclasses import replace

from .programs.frame import Job
from .runner import Program

NAIVE = "naive: httpx + pycryptodome inline"
TUNED = "naive, with a pool as large as the load"
PLAIN = "httpx + OpenSSL inline"
THREADS = "requests + threads + OpenSSL"
AIOHTTP = "raw aiohttp + OpenSSL inline"
UNCHECKED = "raw aiohttp, answers not verified"
CORE = "ours, four dependencies"
FAST = "ours, with `fast`"
FLOOR = "the parts' sum"
OURS = (CORE, FAST)


def program(label: str, job: Job) -> Program:
    """Return the program named ``label``, to do ``job``."""
    openssl = {"LIANLIAN_SIGNING_BACKEND": "openssl"}
    return {
        NAIVE: Program("httpx_inline", job, core=True),
        TUNED: Program("httpx_inline", replace(job, option="tuned"), core=True),
        PLAIN: Program("httpx_inline", replace(job, option="openssl tuned")),
        THREADS: Program("requests_threads", job),
        AIOHTTP: Program("aiohttp_inline", job),
        UNCHECKED: Program("aiohttp_inline", replace(job, option="unchecked")),
        CORE: Program("ours", job, core=True),
        FAST: Program("ours", job, env=openssl),
        FLOOR: Program("parts", job),
    }[label]
