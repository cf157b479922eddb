"""Nothing that comes from a file or the network is unpickled or run: safetensors, Arrow and JSON only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cluster", "rollout_workers", "teacher_workers", "learner", "benchmarks", "examples")
# Modules whose readers run what the bytes say.
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "pickle5"}
# Calls that do, or that run text; by the last words of what is called.
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pd.read_pickle",
    "os.system",
    "load_checkpoint_and_dispatch",
}
WRITES_ONLY = "PickleBuffer"
# What takes the interpreter's place runs the program that it is given, by the user who started it.
INTERPRETERS = {"cluster/nodes/preload.py": {"exec", "compile"}}
# Hidden folders are environments.
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


def faults(source: str) -> Iterator[str]:
    """Yield the names of modules imported and functions called that could run what they read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield from [str(node.module)] if {alias.name for alias in node.names} - {WRITES_ONLY} else []
        elif isinstance(node, ast.Call):
            yield from ([name] if (name := ast.unparse(node.func)) in CALLS else [])
            yield from _allowances(node)


def _allowances(call: ast.Call) -> Iterator[str]:
    """Yield the arguments that open a safe reader, and those that trust code which comes with a model."""
    for keyword in call.keywords:
        is_constant = isinstance(keyword.value, ast.Constant)
        if keyword.arg == "allow_pickle" or (keyword.arg == "weights_only" and not _is(keyword.value, True)):
            yield f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif keyword.arg == "trust_remote_code" and is_constant and not _is(keyword.value, False):
            yield f"trust_remote_code={ast.unparse(keyword.value)}"
        elif keyword.arg == "use_safetensors" and _is(keyword.value, False):
            yield "use_safetensors=False"


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = set(faults(path.read_text())) - INTERPRETERS.get(name, set())
    assert not found, f"{name} uses {found}, which can run what a file says; use safetensors, Arrow or JSON"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("from pickle import PickleBuffer", []),
        ("import torch; torch.load(f)", ["torch.load"]),
        ("torch.load(f, weights_only=False)", ["torch.load", "weights_only=False"]),
        ("np.load(f, allow_pickle=x)", ["np.load", "allow_pickle=x"]),
        ("eval(text)", ["eval"]),
        ("model.eval()", []),
        ("re.compile(text)", []),
        ("f(trust_remote_code=True)", ["trust_remote_code=True"]),
        ("f(trust_remote_code=student.trust_remote_code)", []),
        ("f(use_safetensors=False)", ["use_safetensors=False"]),
    ],
)
def test_the_scan_finds_what_it_should(source: str, found: list[str]) -> None:
    assert list(faults(source)) == found
