"""
Commands of the project as processes of their own that share one import.

Importing torch, transformers and datasets takes several seconds of each process. `ScriptProcess` forks a process from
a server that has imported them, and runs a script or module there as Python itself would: its own process id, signals,
exit code, environment and working directory. A test about imports, or about variables that a library reads while it
is imported, starts a new interpreter instead.
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
# of every process that the tests start
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
IMPORTED = [
    "train_reftr",
    "modeling_reftr.convert_reftr_checkpoint",
    "modeling_reftr.modeling_reftr",
    "modeling_reftr.pipeline_reftr",
    "transformers.models.bert.modeling_bert",
    "transformers.models.timm_backbone.modeling_timm_backbone",
]


def run_script(words: list[str], cwd: str, stdout: str, stderr: str, environment: dict):
    """Run a script or `-m module` as `__main__`, with its output in files; the target of a forked process."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    multiprocessing.set_start_method(None, force=True)  # the system's default, as in any script
    os.chdir(cwd)
    os.environ.update(environment)
    name = words.pop(0)
    try:
        if name == "-m":
            sys.path.insert(0, cwd)
            sys.argv = list(words)
            sys.modules.pop(words[0], None)  # as imported; `__main__` is another copy of it
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(name).resolve().parent))
            sys.argv = [name, *words]
            runpy.run_path(name, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def start_server():
    """Start the server of processes unless it runs, and return the context that takes processes from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    # the server inherits the environment when it is started, by the first process
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


class ScriptProcess:
    """
    A running command with the methods of `subprocess.Popen` that the tests use.

    Args:
        words (`list`): a script, or "-m" and a module, with its arguments.
        cwd (`str` or `Path`): the working directory.
        merge (`bool`): whether stderr goes where stdout goes.
        environment (`dict`): variables that no library reads while it is imported.
    """

    def __init__(self, words, cwd=ROOT, merge: bool = False, environment: dict | None = None):
        self.args = [str(word) for word in words]
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
        """The exit code, or minus the signal that ended the process; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """See `returncode`."""
        return self.process.exitcode

    def send_signal(self, number: int):
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def kill(self):
        """Kill the process."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process; raises `subprocess.TimeoutExpired`."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the process; what it wrote to stdout and to stderr."""
        self.wait(timeout)
        written = [path.read_text() if path.exists() else "" for path in (self.stdout, self.stderr)]
        return written[0], "" if self.stderr == self.stdout else written[1]


def run_process(words, cwd=ROOT, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a command to its end, as `subprocess.run` does; one that takes longer is killed."""
    process = ScriptProcess(words, cwd)
    try:
        stdout, stderr = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_ranks(words, ranks: int, merge: bool = True) -> list[ScriptProcess]:
    """
    Start a command as several ranks, as a cluster starts them: without a launcher, each told its place by variables.
    """
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        ScriptProcess(words, merge=merge, environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def run_ranks(words, ranks: int, timeout: float = 300) -> subprocess.CompletedProcess:
    """
    Run a command as several ranks to its end, see `start_ranks`.

    Returns:
        `subprocess.CompletedProcess`: of rank 0.

    Raises:
        RuntimeError: if a rank fails, with its output.
    """
    started = start_ranks(words, ranks, merge=False)
    try:
        written = [process.communicate(timeout) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    for rank, process in enumerate(started):
        if process.returncode:
            raise RuntimeError(f"Rank {rank} of {words} ended with {process.returncode}:\n{''.join(written[rank])}")
    return subprocess.CompletedProcess(started[0].args, 0, *written[0])


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
