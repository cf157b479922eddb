"""Builds the project's virtual environment from a lock: `python3 cluster/install/install.py` (or `make install`).

It needs nothing but the standard library, and its syntax stays readable to old Pythons so that they too get the one
sentence that says which Python is wanted. Three environment variables change what it does: `PYTHON` (read by make)
names the interpreter, `PRECEPTOR_BACKEND` (`cpu` or `cuda`) overrules the search for a GPU, and `PRECEPTOR_TORCH_INDEX`
replaces the package index that is asked for the CPU build of torch.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

SUPPORTED_PYTHONS = ((3, 11), (3, 12), (3, 13))  # those the locks were resolved for
MIN_GLIBC = (2, 31)  # the oldest that every wheel in the locks accepts
MIN_DRIVER = 580  # of NVIDIA: the CUDA lock is CUDA 13's; with an older one torch finds no GPU
MIN_CAPABILITY = (7, 5)  # of a GPU: CUDA 13 has no code for older ones
FREE_GB = {"cpu": 6, "cuda": 20}  # measured 4.0 and 8.9 finished; pip keeps and unpacks downloads beside that
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SHARES = 6  # of the lock, so that those who are early take more of them
MAX_PIPS = 4  # at once: each unpacks and compiles on one core
STAMP = "preceptor.stamp"  # in the environment, written once it holds all the packages; the Makefile looks for it too


class InstallError(Exception):
    """The environment cannot be built here; the message is one sentence for the user."""


def main() -> int:
    """Install, or explains in one sentence why it cannot."""
    root = Path(__file__).resolve().parents[2]
    try:
        check_python(sys.version_info[:2], platform.python_implementation())
        check_machine()
        with only_one(root):
            install(root, choose_backend())
    except InstallError as error:
        print(f"preceptor install: {error}", file=sys.stderr)
        return 1
    return 0


def install(root: Path, backend: str) -> None:
    """Make `.venv` under `root` hold exactly the backend's lock and the project; do nothing when it already does."""
    venv = root / ".venv"
    lock = root / "cluster" / "install" / f"{backend}.lock"
    packages_key = digest(lock.read_bytes(), str(sys.implementation.cache_tag).encode(), str(venv).encode())
    project_key = digest((root / "pyproject.toml").read_bytes())
    if read_stamp(venv) == (packages_key, project_key):
        return
    if read_stamp(venv)[0] != packages_key:
        check_compiler(dict(os.environ))
        check_disk(root, FREE_GB[backend])
        create_environment(venv)
        install_lock(venv, lock)
    print("Installing preceptor itself.", flush=True)
    write_stamp(venv, packages_key, "unfinished")
    pip(venv, "install", "--no-deps", "--no-build-isolation", "--editable", str(root))
    write_stamp(venv, packages_key, project_key)
    print(f"Done: {venv / 'bin' / 'preceptor'}", flush=True)


def check_python(version: "tuple[int, ...]", implementation: str) -> None:
    """Refuse an interpreter that the locks were not resolved for."""
    if implementation != "CPython" or tuple(version) not in SUPPORTED_PYTHONS:
        wanted = " or ".join("{}.{}".format(*supported) for supported in SUPPORTED_PYTHONS)
        present = f"{implementation} {version[0]}.{version[1]}"
        raise InstallError(
            f"this is {present}, the locked packages need CPython {wanted}; try `PYTHON=python3.11 make install`"
        )


def check_machine() -> None:
    """Refuse a machine for which the locked packages have no builds."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise InstallError(f"this is {system} on {machine}, the locked packages exist for Linux on x86_64 only")
    library, version = platform.libc_ver()
    wanted = ".".join(str(part) for part in MIN_GLIBC)
    if library != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < MIN_GLIBC:
        present = f"{library} {version}" if library else "not glibc"
        raise InstallError(f"the C library is {present}, the locked packages need glibc {wanted} or newer")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise InstallError("Python.h is missing, DeepSpeed compiles against it; install python3-dev (or python3-devel)")


def check_compiler(environment: "dict[str, str]") -> None:
    """Refuse a machine without a C and a C++ compiler: DeepSpeed and vLLM compile when they first start."""
    for language, variable, default in (("C", "CC", "gcc"), ("C++", "CXX", "g++")):
        compiler = environment.get(variable) or default
        if shutil.which(compiler.split()[0], path=environment.get("PATH")) is None:
            raise InstallError(
                f"no {language} compiler: `{compiler}` is not on PATH, and DeepSpeed and vLLM compile code when they "
                f"first start; install gcc and g++, or set {variable}"
            )


def check_disk(folder: Path, needed_gb: int) -> None:
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise InstallError(f"{folder} has {free_gb:.1f} GB free, the environment needs about {needed_gb} GB")


@contextlib.contextmanager
def only_one(root: Path) -> "Iterator[None]":
    """Wait until no other process installs into the same clone: two of them would delete each other's files."""
    import fcntl  # Linux has it; other systems have to hear first that they are not supported

    folder = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def choose_backend() -> str:
    """Return `cuda` where an NVIDIA driver answers, else `cpu`; `PRECEPTOR_BACKEND` overrules."""
    chosen = os.environ.get("PRECEPTOR_BACKEND", "")
    if chosen:
        if chosen not in FREE_GB:
            raise InstallError(f"PRECEPTOR_BACKEND is `{chosen}`, it must be `cpu` or `cuda`")
        return chosen
    if shutil.which("nvidia-smi") is None or "GPU" not in nvidia_smi("-L"):
        return "cpu"
    check_gpus(nvidia_smi("--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader"))
    return "cuda"


def nvidia_smi(*arguments: str) -> str:
    """Return what the driver's tool prints; nothing where it fails."""
    result = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return result.stdout if result.returncode == 0 else ""


def check_gpus(listing: str) -> None:
    """Refuse GPUs that the CUDA lock cannot use; lines are "550.54.14, 9.0, NVIDIA H100", one for each GPU."""
    advice = "or choose PRECEPTOR_BACKEND=cpu (or cuda, for another machine than this one)"
    for line in filter(None, map(str.strip, listing.splitlines())):
        driver, capability, name = (part.strip() for part in line.split(",", 2))
        if driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < MIN_DRIVER:
            raise InstallError(
                f"the NVIDIA driver is {driver}, the locked torch is built for CUDA 13 and needs {MIN_DRIVER} or "
                f"newer; update the driver, {advice}"
            )
        if capability.replace(".", "").isdigit() and tuple(map(int, capability.split("."))) < MIN_CAPABILITY:
            raise InstallError(
                f"the {name} has compute capability {capability}, CUDA 13 needs "
                f"{'.'.join(map(str, MIN_CAPABILITY))} or newer; use another GPU, {advice}"
            )


def create_environment(venv: Path) -> None:
    """Replace whatever is at `venv`: packages that were half written, or belong to another lock, never mix."""
    print(f"Creating {venv} with Python {platform.python_version()}.", flush=True)
    # Not `sys.executable`: this may run in the very environment that is replaced.
    base = Path(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info[:2]))
    result = subprocess.run([str(base), "-m", "venv", "--clear", str(venv)], capture_output=True, text=True)
    if result.returncode != 0:
        advice = "install python3-venv (Debian, Ubuntu): " if "ensurepip" in result.stdout else ""
        raise InstallError(f"`{base} -m venv` failed; {advice}{(result.stdout + result.stderr).strip()}")


def install_lock(venv: Path, lock: Path) -> None:
    """Install every pin of `lock`, shares of it at once; nothing is resolved, so the order does not matter.

    Torch's CPU build comes by itself, as only that may come from PyTorch's own index.
    """
    pins = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    print(f"Installing {len(pins)} packages from {lock.name}; this takes minutes.", flush=True)
    torch = [pin for pin in pins if pin.startswith("torch==") and pin.endswith("+cpu")]
    # Packages whose names begin alike may both write the file of their common namespace.
    families = [list(alike) for _, alike in groupby((pin for pin in pins if pin not in torch), key=family)]
    calls: list[Callable[[], None]] = [partial(install_cpu_torch, venv, pin) for pin in torch]
    for number in range(SHARES):
        share = venv / f"{lock.stem}-{number}.txt"
        share.write_text("\n".join(pin for alike in families[number::SHARES] for pin in alike))
        calls.append(partial(pip, venv, "install", "--no-deps", "--requirement", str(share)))
    with ThreadPoolExecutor(min(MAX_PIPS, os.cpu_count() or 1)) as threads:
        for ended in [threads.submit(call) for call in calls]:
            ended.result()


def family(pin: str) -> str:
    """Return how the name of a package begins: `nvidia` for `nvidia-cublas==13.1`."""
    return pin.split("==")[0].split("-")[0]


def install_cpu_torch(venv: Path, pin: str) -> None:
    """Install the CPU build from where pip looks by itself, else from PyTorch's index (PyPI has the CUDA build only).

    The index is named for this one package and command, so it cannot supply any other.
    """
    arguments = ("install", "--no-deps", pin)
    try:
        pip(venv, *arguments, quiet=True)
    except InstallError:
        index = os.environ.get("PRECEPTOR_TORCH_INDEX", TORCH_CPU_INDEX)
        print(f"Taking {pin} from {index}.", flush=True)
        pip(venv, *arguments, "--extra-index-url", index)


def pip(venv: Path, *arguments: str, quiet: bool = False) -> None:
    """Run the environment's pip, which prints errors only (none when `quiet`); raise when it fails."""
    python = str(venv / "bin" / "python")
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "-qq", *arguments]
    errors = subprocess.DEVNULL if quiet else None
    code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors).returncode
    if code != 0:
        raise InstallError(
            f"`pip {' '.join(arguments)}` failed with exit code {code}; run `make install` again to retry"
        )


def read_stamp(venv: Path) -> "tuple[str, str]":
    """Return what the environment was built from: (packages, project), two empty strings without all the packages."""
    stamp = venv / STAMP
    if not stamp.exists() or not (venv / "bin" / "python").exists():
        return "", ""
    packages_key, project_key = stamp.read_text().split()
    return packages_key, project_key


def write_stamp(venv: Path, packages_key: str, project_key: str) -> None:
    (venv / STAMP).write_text(f"{packages_key} {project_key}\n")


def digest(*parts: bytes) -> str:
    """Return one hash for several byte strings, each of which counts with its length."""
    return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
