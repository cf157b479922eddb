"""Imports the large packages once, and forks the programs of a node from there.

Importing torch, transformers and vLLM takes ten CPU-seconds, and every engine has two processes that need them. This
program (`python preload.py FD FOLDER`) imports, listens, and becomes a copy of itself for each program that
`start_preloaded.py` requests. It forks while it has one thread and CUDA is not initialised, as vLLM itself does outside
Ray; otherwise it ends with a sentence, and programs start as usual. It ends when its standard input, which its owner
holds, is closed.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import random
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PACKAGES = (
    "pyarrow",
    "transformers.modeling_utils",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_model_runner",
)
# A Ray worker's job is in its environment, which Ray reads when it is imported. vLLM needs Ray only if Ray is to run
# its workers.
NOT_YET = "ray"
# For the imports: no library starts a thread, and no check initialises CUDA.
SETTINGS = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# The imports do not read these variables, or `_renew` reads them anew, or (the last line) they say what vLLM does to
# its own processes on a CPU. A program that differs from this process in others starts as usual.
FREE_NAMES = {
    *SETTINGS,
    *("OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "PYTHONWARNINGS"),
    *("CUDA_VISIBLE_DEVICES", "TRITON_F32_DEFAULT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("TMPDIR", "PWD", "OLDPWD", "SHLVL", "_", "LINES", "COLUMNS", "SPT_NOENV", "PYTHONBREAKPOINT"),
    *("LD_PRELOAD", "NUMEXPR_MAX_THREADS"),
}
FREE_PREFIXES = ("RAY_", "VLLM_", "PRECEPTOR_", "GLOO_", "NCCL_", "MASTER_", "PYTEST_")
CLUSTER, CLUSTER_FD = "PRECEPTOR_CLUSTER", 999  # `MARK` and `MARK_FD` of the reaper, another program by itself
LARGEST_MESSAGE = 256  # file descriptors at once, or ended programs
CUDA_NOT_INITIALISED = 3  # CUDA_ERROR_NOT_INITIALIZED


@dataclass(frozen=True)
class Program:
    """Says what a copy is to run."""

    arguments: list[str]  # as Python's: a script's path or "-c" first
    environment: dict[str, str]
    folder: str
    umask: int
    fds: list[int]  # their numbers in the program
    received: list[int]  # the same ones in this process


def main(listener_fd: int, folder: str) -> None:
    """Serve until the owner is gone, and remove the socket's folder; in a copy, run its program."""
    os.environ["SPT_NOENV"] = "1"  # titles do not spread over the environment, by which the reaper knows processes
    began_with = dict(os.environ)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with socket.socket(fileno=listener_fd) as listener:
        del sys.path[0]  # the folder of this file
        _import_packages()
        gc.freeze()  # collecting in a copy would copy every page that it looks at
        imported = {name: value for name, value in os.environ.items() if name not in began_with}
        free = imported.keys() | FREE_NAMES
        _check_fork()
        program = _Server(listener, began_with, free).serve()
    if program is not None:
        _run(program, imported)
    shutil.rmtree(folder, ignore_errors=True)


def _import_packages() -> None:
    sys.modules[NOT_YET] = None  # type: ignore[assignment]  # importing it fails
    for name in PACKAGES:
        with suppress(ImportError):  # the program that needs it says so
            importlib.import_module(name)
    del sys.modules[NOT_YET]


def _check_fork() -> None:
    """End this process if something would not survive a fork."""
    threads = [(path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    if len(threads) > 1:
        _give_up(f"an imported package has started threads: {', '.join(threads)}")
    with suppress(OSError):  # this node has no GPU
        cuda = ctypes.CDLL("libcuda.so.1")
        if cuda.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) != CUDA_NOT_INITIALISED:
            _give_up("an imported package has initialised CUDA")


def _give_up(reason: str) -> None:
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    os._exit(1)  # taking the modules down takes a while, in which programs would wait


class _Server:
    """Forks on request, tells each stand-in how its program ends, and ends the programs of stand-ins that are gone."""

    def __init__(self, listener: socket.socket, environment: dict[str, str], free: set[str]) -> None:
        self._listener = listener
        self._free = free
        self._environment = self._fixed(environment)
        self._stand_ins: dict[int, socket.socket] = {}  # by process id
        self._ended, wake = os.pipe()  # readable when a program has ended
        for fd in (self._ended, wake):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from now on there are programs to wait for
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._selector = selectors.DefaultSelector()
        for source in (listener.fileno(), self._ended, sys.stdin.fileno()):
            self._selector.register(source, selectors.EVENT_READ)

    def serve(self) -> Program | None:
        """Return the program that this copy is to run; in the first process None, when owner and programs are gone."""
        has_owner = True
        while has_owner or self._stand_ins:
            for key, _ in self._selector.select():
                if key.fd == self._listener.fileno():
                    if (program := self._accept()) is not None:
                        return program
                elif key.fd == self._ended:
                    self._report_ended()
                elif key.fd == sys.stdin.fileno():
                    self._selector.unregister(key.fd)
                    has_owner = False
                elif key.data in self._stand_ins:  # a stand-in sends nothing after its request: it is gone
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)  # a zombie keeps its id until `_report_ended`
        return None

    def _accept(self) -> Program | None:
        stand_in, _ = self._listener.accept()
        program, received = _receive(stand_in)
        pid = os.fork() if program is not None and self._takes(program) else None
        if pid == 0:
            self._forget(stand_in)
            return program
        for fd in received:
            os.close(fd)
        if pid is None:
            stand_in.close()
            return None
        self._stand_ins[pid] = stand_in
        self._selector.register(stand_in, selectors.EVENT_READ, data=pid)
        with suppress(OSError):
            stand_in.sendall(b"%d\n" % pid)
        return None

    def _takes(self, program: Program) -> bool:
        """Return whether the imports were done as the program would do them."""
        first = program.arguments[0] if program.arguments else "-"
        is_known = first == "-c" or not first.startswith("-")  # multiprocessing runs the former, Ray the latter
        return is_known and self._fixed(program.environment) == self._environment

    def _fixed(self, environment: dict[str, str]) -> dict[str, str]:
        names = (name for name in environment if name not in self._free and not name.startswith(FREE_PREFIXES))
        return {name: environment[name] for name in names}

    def _forget(self, stand_in: socket.socket) -> None:
        """Give up, in a copy, what belongs to the first process."""
        os.setpgid(0, 0)  # Ray ends a worker's whole process group
        wake = signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        for connection in (stand_in, *self._stand_ins.values()):
            connection.close()
        os.close(self._ended)
        os.close(wake)

    def _report_ended(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._ended, LARGEST_MESSAGE)
        while self._stand_ins:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            stand_in = self._stand_ins.pop(pid, None)
            if stand_in is None:  # a process of an imported package
                continue
            with suppress(KeyError):  # the stand-in ended first
                self._selector.unregister(stand_in)
            with suppress(OSError):
                stand_in.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            stand_in.close()


def _receive(stand_in: socket.socket) -> tuple[Program | None, list[int]]:
    """Read a request, None if the stand-in ended before it was whole, and the file descriptors that came with it."""
    received: list[int] = []
    try:
        length, received, _, _ = socket.recv_fds(stand_in, 8, LARGEST_MESSAGE)
        body = stand_in.makefile("rb").read(int.from_bytes(length, "big"))
        return Program(received=received, **json.loads(body)), received
    except (OSError, ValueError):
        return None, received


def _run(program: Program, imported: dict[str, str]) -> None:
    """Do what Python does with these arguments, and end this process."""
    _take_fds(program)
    script, *arguments = program.arguments
    is_command = script == "-c"
    if is_command:  # an engine; Ray's workers are scripts, and Ray's own way does not work after this one
        _find_title()
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(imported | program.environment)
    os.chdir(program.folder)
    os.umask(program.umask)
    if folder := os.environ.get(CLUSTER):
        with suppress(OSError):  # fewer files may be open
            fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(fd, CLUSTER_FD, inheritable=False)
            os.close(fd)
    sys.argv = ["-c", *arguments[1:]] if is_command else program.arguments
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    rest = [path for path in sys.path if path not in before]
    sys.path[:] = ["" if is_command else str(Path(script).absolute().parent), *own, *rest]
    _renew()
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    if not is_command:
        main_module.__file__ = script
    text = arguments[0] if is_command else Path(script).read_bytes()
    try:
        exec(compile(text, "<string>" if is_command else script, "exec"), main_module.__dict__)
        status: object = 0
    except SystemExit as ending:
        status = ending.code
    except BaseException:  # noqa: BLE001  # the end of the program, of which Python prints the trace
        sys.excepthook(*sys.exc_info())
        status = 1
    _end(status)


def _take_fds(program: Program) -> None:
    """Give the file descriptors the numbers that the program knows them by."""
    above = max([*program.fds, *program.received], default=0) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in program.received]
    for fd in program.received:
        os.close(fd)
    for fd, number in zip(moved, program.fds, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def _find_title() -> None:
    """Let the package that vLLM sets titles with find the title, beside the environment, before that one changes."""
    with suppress(ImportError):
        from setproctitle import getproctitle

        getproctitle()


def _renew() -> None:
    """Draw and read again what a process draws and reads when it starts."""
    random.seed()
    tempfile.tempdir = None
    warnings._processoptions(os.environ.get("PYTHONWARNINGS", "").split(","))  # type: ignore[attr-defined]
    modules, variables = sys.modules, os.environ  # of packages that are not installed there is no module
    if "numpy" in modules:
        modules["numpy"].random.seed()
    if "torch._dynamo.config" in modules:
        modules["torch._dynamo.config"].disable = variables.get("TORCH_COMPILE_DISABLE") == "1"  # type: ignore[attr-defined]
    if "torch._inductor.config" in modules:
        of_cpp = modules["torch._inductor.config"].cpp
        of_cpp.dynamic_threads = variables.get("TORCHINDUCTOR_CPP_DYNAMIC_THREADS") == "1"
    if "torch" in modules and (threads := variables.get("OMP_NUM_THREADS")):
        modules["torch"].set_num_threads(int(threads))


def _end(status: object) -> None:
    """End as the interpreter does, but leave the modules: taking five thousand of them down takes a while."""
    if status is not None and not isinstance(status, int):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
