"""A Ray cluster of several nodes on this machine, as `ray start` makes it, with a token; and `ray job` against it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
SUBMIT = ("job", "submit", "--working-dir", ".")
MEMORY = str(100 * 2**20)
APART = 'for folder in $0; do mount -t tmpfs tmpfs "$folder" || exit; done; exec "$@"'
"""Runs a command that sees nothing of what others have in the folders `$0`."""
TOO_BUSY = "The current node timed out during startup"
"""What `ray start` ends with where a node has not registered within Ray's 30 s, which no setting changes."""


def free_ports(count: int) -> list[str]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def can_unshare() -> bool:
    """Whether this machine grants a process mounts of its own."""
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True)
    return tried.returncode == 0


class Nodes:
    """A cluster whose nodes are processes; as a context manager, it leaves none behind."""

    def __init__(self, *cpus: int, hidden: Path | None = None, **environment: str):
        """The head and workers with so many CPUs each, started with these environment variables.

        Where the machine grants it, workers have a shared memory and a session folder of their own as on other
        machines, and see nothing in the folder `hidden`.
        """
        self._cpus, self._apart = cpus, can_unshare()
        self._folder = Path(tempfile.mkdtemp(prefix="ray"))  # its sockets need a short path
        self._own = ["/dev/shm", str(self._folder), *([str(hidden)] if hidden else [])]
        self._gcs, self._dashboard = free_ports(2)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PRISM_RAY_"))}
        inherited.pop("PYTHONPATH", None)  # what a job imports must be what it was submitted with
        self.environment = {
            **inherited,
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self._dashboard}",
            "RAY_TMPDIR": str(self._folder),
            "COLUMNS": "200",
        }
        self._processes: list[subprocess.Popen] = []
        self._more_tries = 3

    def __enter__(self) -> Nodes:
        head, *workers = self._cpus
        at = ["--head", "--port", self._gcs, "--dashboard-port", self._dashboard]
        self._start(head, *at, "--include-dashboard", "true", "--temp-dir", str(self._folder))
        try:
            self._wait_for(1)
            for cpus in workers:
                self._start(cpus, "--address", f"127.0.0.1:{self._gcs}", apart=self._apart)
            self._wait_for(len(self._cpus))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        family = self._family()
        for process in family:
            if process.is_running():
                process.kill()
        for each in self._processes:
            each.kill()
            each.wait()
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def ray(self, *words: str, timeout_s: float = 300.0, **environment: str) -> subprocess.CompletedProcess[str]:
        """`ray …` as a person types it in the repository."""
        return subprocess.run(
            [RAY, *words],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def submit(self, *words: str, options: Sequence[str] = (), timeout_s: float = 300.0):
        """`ray job submit --working-dir . -- python …`, to its end."""
        return self.ray(*SUBMIT, *options, "--", sys.executable, *words, timeout_s=timeout_s)

    def submitted(self, name: str, log: Path, *words: str, options: Sequence[str] = ()) -> subprocess.Popen:
        """The same under a submission id, under way; what it prints goes into `log`."""
        command = [RAY, *SUBMIT, "--submission-id", name, *options, "--", sys.executable, *words]
        with log.open("w") as file:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT)

    def _start(self, cpus: int, *where: str, apart: bool = False) -> None:
        ports = free_ports(5)
        names = ("agent-listen-port", "agent-grpc-port")
        command = [RAY, "start", "--block", "--num-cpus", str(cpus), "--object-store-memory", MEMORY, *where]
        command += [f"--dashboard-{name}={port}" for name, port in zip(names, ports[:2], strict=True)]
        command += [f"--metrics-export-port={ports[2]}", f"--runtime-env-agent-port={ports[3]}"]
        command += [f"--ray-client-server-port={ports[4]}"] if "--head" in where else []
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        if apart:
            command = ["unshare", "--mount", "sh", "-c", APART, " ".join(self._own), *command]
        self._run(command)

    def _run(self, command: Sequence[str]) -> None:
        log = (self._folder / f"node{time.monotonic_ns()}.log").open("w")
        self._processes.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd="/")
        )

    def _wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 180
        while self._raylets() < count:
            ended = [each for each in self._processes if each.poll() is not None]
            logs = "".join(path.read_text()[-2000:] for path in self._folder.glob("node*.log"))
            if ended and TOO_BUSY in logs and self._more_tries:
                self._more_tries -= 1
                self._processes.remove(ended[0])
                self._run(ended[0].args)
                continue
            assert not ended and time.monotonic() < deadline, logs
            time.sleep(0.3)

    def _family(self) -> list[psutil.Process]:
        """The living processes that the nodes consist of."""
        living = [psutil.Process(each.pid) for each in self._processes if each.poll() is None]
        return [process for each in living for process in each.children(recursive=True)]

    def _raylets(self) -> int:
        found = 0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += process.name() == "raylet"
        return found
