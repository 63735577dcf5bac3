"""
Run commands of the project in separate processes that share one import.

Importing torch, transformers and datasets takes several seconds per process. `ScriptProcess` forks a process from a
server that has imported them, and runs a script or module in it as Python would: with its own process id, signals,
exit code, environment and working directory. Tests of imports, or of variables that a library reads when it is
imported, start a new interpreter instead.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).resolve().parents[2]
# variables of every process that the tests start
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
IMPORTED = [
    "train_reftr",
    "modeling_reftr.convert_reftr_checkpoint",
    "modeling_reftr.modeling_reftr",
    "modeling_reftr.pipeline_reftr",
    "transformers.models.bert.modeling_bert",
    "transformers.models.timm_backbone.modeling_timm_backbone",
]


def run_script(argv: list[str], cwd: str, stdout: str, stderr: str, environment: dict):
    """Run a script or `-m module` as `__main__`, with its output in files; the target of a forked process."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    multiprocessing.set_start_method(None, force=True)  # the system's default, as in any script
    os.chdir(cwd)
    os.environ.update(environment)
    name = argv.pop(0)
    try:
        if name == "-m":
            sys.path.insert(0, cwd)
            sys.argv = list(argv)
            sys.modules.pop(argv[0], None)  # `__main__` must be a new copy of an imported module
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(name).resolve().parent))
            sys.argv = [name, *argv]
            runpy.run_path(name, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def start_server():
    """Start the fork server unless it runs, and return the context that forks processes from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    # the server inherits the environment in which it is started
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


class ScriptProcess:
    """
    A running command with the methods of `subprocess.Popen` that the tests use.

    Args:
        argv (`list`): a script, or "-m" and a module, with its arguments.
        cwd (`str` or `Path`): the working directory.
        merge (`bool`): whether stderr is redirected to stdout.
        environment (`dict`): environment variables that no library reads when it is imported.
    """

    def __init__(self, argv, cwd=ROOT, merge: bool = False, environment: dict | None = None):
        self.args = [str(argument) for argument in argv]
        self.folder = tempfile.TemporaryDirectory(prefix="output_")
        self.stdout = Path(self.folder.name, "stdout")
        self.stderr = self.stdout if merge else Path(self.folder.name, "stderr")
        context = start_server()
        output = (str(self.stdout), str(self.stderr), environment or {})
        self.process = context.Process(target=run_script, args=(self.args, str(cwd), *output))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """Return the exit code, or the negative number of the signal that ended the process; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.process.exitcode

    def send_signal(self, number: int):
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def kill(self):
        """Kill the process."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process and return its exit code; raise `subprocess.TimeoutExpired` after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the process and return its stdout and stderr."""
        self.wait(timeout)
        written = [path.read_text() if path.exists() else "" for path in (self.stdout, self.stderr)]
        return written[0], "" if self.stderr == self.stdout else written[1]


def run_process(argv, cwd=ROOT, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a command like `subprocess.run`, and kill it after `timeout` seconds."""
    process = ScriptProcess(argv, cwd)
    try:
        stdout, stderr = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_ranks(argv, ranks: int, merge: bool = True) -> list[ScriptProcess]:
    """Start a command on several ranks like a cluster: without a launcher, with the rank in environment variables."""
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        ScriptProcess(argv, merge=merge, environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def run_ranks(argv, ranks: int, timeout: float = 300) -> subprocess.CompletedProcess:
    """
    Run a command on several ranks, see `start_ranks`.

    Returns:
        `subprocess.CompletedProcess`: the result of rank 0.

    Raises:
        RuntimeError: if a rank fails, with its output.
    """
    started = start_ranks(argv, ranks, merge=False)
    try:
        outputs = [process.communicate(timeout) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    for rank, process in enumerate(started):
        if process.returncode:
            raise RuntimeError(f"Rank {rank} of {argv} ended with {process.returncode}:\n{''.join(outputs[rank])}")
    return subprocess.CompletedProcess(started[0].args, 0, *outputs[0])


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
