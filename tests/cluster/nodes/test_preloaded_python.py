import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.nodes import reaper
from cluster.nodes.preloaded_python import PYTHON_VARIABLE, preloaded_python

SHOW = "import json, os, sys; print(json.dumps({}))"
IMPORT_SECONDS = "import time; began = time.monotonic(); import torch; print(time.monotonic() - began)"
IS_PRELOADED = "import sys; print('vllm.v1.engine.core' in sys.modules)"
PATIENCE_SECONDS = 120.0  # the imports take ten seconds of a core
# Makes the process that imports find none of the large packages: what such a test holds is not what they are.
FINDS_NONE = """
import sys, threading, time
if any(part.endswith("preload.py") for part in sys.orig_argv):
    sys.modules.update(dict.fromkeys(("transformers", "vllm")))
"""


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    before = os.environ.pop(PYTHON_VARIABLE, None)
    with preloaded_python():
        yield os.environ[PYTHON_VARIABLE]
    if before is not None:
        os.environ[PYTHON_VARIABLE] = before


@pytest.fixture
def customised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a file that every Python process runs first."""
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "sitecustomize.py").write_text(FINDS_NONE)
    return tmp_path / "sitecustomize.py"


def output(*command: str, **options: object) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, **options)  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stderr
    return str(ended.stdout)


def test_a_program_begins_with_the_packages_imported(python: str) -> None:
    assert output(python, "-c", IS_PRELOADED) == "True\n"
    assert output(sys.executable, "-c", IS_PRELOADED) == "False\n"


def test_a_program_sees_what_it_would_see_under_the_usual_interpreter(python: str, tmp_path: Path) -> None:
    of_system = "os.getcwd(), os.umask(0), os.environ['RAY_OWN'], sys.stdin.read()"
    seen = f"['vllm' in sys.modules, [sys.argv, {of_system}, sys.executable, __name__, sys.path]]"
    script = tmp_path / "script.py"
    script.write_text(SHOW.format(seen))
    options = {
        "cwd": tmp_path,
        "env": os.environ | {"RAY_OWN": "a variable"},
        "input": "what stands there",
        "umask": 0o027,
    }
    for command in (["-c", SHOW.format(seen), "x"], [str(script), "x", "--flag"], ["script.py"]):
        is_preloaded, ours = json.loads(output(python, *command, **options))
        _, usual = json.loads(output(sys.executable, *command, **options))
        assert is_preloaded
        ours[-1] = ours[-1][: len(usual[-1])]  # imported packages may add folders of theirs
        assert ours == usual


def test_a_program_has_the_pipes_of_whoever_starts_it(python: str) -> None:
    reading, writing = os.pipe()
    program = subprocess.Popen([python, "-c", f"import os; os.write({writing}, b'through')"], pass_fds=[writing])
    os.close(writing)
    with open(reading, "rb") as file:  # noqa: PTH123  # a number, not a path
        assert file.read() == b"through"
    assert program.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('a reason')", 1),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_it_ends_as_the_program_ends(python: str, code: str, status: int) -> None:
    assert subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == status


def test_functions_that_were_registered_run_at_the_end(python: str) -> None:
    code = "import atexit, threading; atexit.register(print, 'end'); threading.Timer(0.2, print, ['thread']).start()"
    assert output(python, "-c", code) == "thread\nend\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_ends_with_its_stand_in(python: str, number: signal.Signals) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    stand_in = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True)
    assert stand_in.stdout is not None
    pid = int(stand_in.stdout.readline())
    assert pid != stand_in.pid
    stand_in.send_signal(number)
    assert stand_in.wait(PATIENCE_SECONDS) == -number
    stand_in.stdout.close()
    assert is_gone(pid)


def test_threads_are_as_many_as_the_programs_environment_says(python: str) -> None:
    for threads in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        assert output(python, "-c", "import torch; print(torch.get_num_threads())", env=environment) == f"{threads}\n"


@pytest.mark.parametrize(
    "code",
    [
        "from vllm.utils.system_utils import set_process_title; set_process_title('title')",
        "from ray._raylet import setproctitle; setproctitle('title')",
    ],
    ids=["vLLM in a process of multiprocessing", "Ray in a script"],
)
def test_vllm_and_ray_say_what_a_program_is(python: str, code: str, tmp_path: Path) -> None:
    show = "from pathlib import Path; print(Path('/proc/self/cmdline').read_bytes().split(bytes(1))[0].decode())"
    script = tmp_path / "script.py"
    script.write_text(f"{code}; {show}")
    arguments = [str(script)] if "ray" in code else ["-c", script.read_text()]
    assert output(python, *arguments).endswith("title\n")


def test_no_two_programs_draw_the_same_random_numbers(python: str) -> None:
    code = "import random, numpy; print(random.random(), numpy.random.random())"
    first, second = (output(python, "-c", code).split() for _ in range(2))
    assert first[0] != second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("arguments", [["-c", IS_PRELOADED], ["-m", "json.tool", "--help"]])
def test_what_the_imports_may_have_read_otherwise_starts_as_usual(python: str, arguments: list[str]) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "a value that this process does not have"}
    assert output(python, *arguments, env=environment) == output(sys.executable, *arguments, env=environment)


@pytest.mark.usefixtures("customised")
def test_programs_start_as_usual_when_the_server_is_gone(tmp_path: Path) -> None:
    owner = textwrap.dedent("""
        import os, signal
        from cluster.nodes.preloaded_python import preloaded_python
        with preloaded_python():
            print(os.environ["PRECEPTOR_PYTHON"], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    started = subprocess.run([sys.executable, "-c", owner], capture_output=True, text=True, check=False, cwd=Path.cwd())
    python = Path(started.stdout.strip())
    kept = tmp_path / "python"
    kept.write_text(python.read_text())
    kept.chmod(0o700)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while python.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not python.parent.exists()  # the server saw its owner's end, and removed its folder
    assert output(str(kept), "-c", IS_PRELOADED) == "False\n"


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_the_reaper_of_a_cluster_knows_a_program_of_the_cluster(python: str, tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    environment = os.environ | {reaper.MARK: str(tmp_path)}
    stand_in = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert stand_in.stdout is not None
    pid = int(stand_in.stdout.readline())
    assert pid in {member for member, _ in reaper.ProcessTree(reaper.MARK, str(tmp_path)).count()}
    stand_in.kill()
    stand_in.wait()
    stand_in.stdout.close()


def test_whoever_needs_no_program_does_not_wait_for_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    began = time.monotonic()
    with preloaded_python():
        folder = Path(os.environ[PYTHON_VARIABLE]).parent
    # What is imported takes several times as long as torch alone.
    assert time.monotonic() - began < float(output(sys.executable, "-c", IMPORT_SECONDS))
    assert not folder.exists()


def test_a_package_that_starts_a_thread_is_named_and_programs_start_as_usual(
    customised: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with customised.open("a") as file:
        file.write("    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n")
    with preloaded_python():
        assert output(os.environ[PYTHON_VARIABLE], "-c", IS_PRELOADED) == "False\n"
    assert caplog.messages == [
        "ray.preload: every worker imported by itself: an imported package has started threads: python, python"
    ]


def test_a_long_folder_for_temporary_files_is_no_hindrance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    with preloaded_python():
        assert (Path(os.environ[PYTHON_VARIABLE]).parent / "socket").exists()
