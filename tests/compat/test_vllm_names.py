"""What the program uses of vLLM: all of it is in the installed release, and what a tree lacks is found and named."""

import shutil
from pathlib import Path

import pytest

from tests.compat.vllm_names import NEEDS, installed_vllm, lacking_in, spared_in, unmet_needs
from tests.compat.vllm_tree import VllmTree

BASE = """
from vllm.inner import Passed as Renamed
from . import inner
class Parent:
    kept: int = 0
    def act(self, first, *, second): self.later = first
class Child(Parent[int]):
    def __init__(self, own): ...
class Wanting(Child):
    @staticmethod
    @abstractmethod
    def send(): ...
    @abstractmethod
    def receive(self): ...
class Half(Wanting):
    def receive(self): ...
try:
    import absent
except ImportError:
    def fallback(value): ...
"""


@pytest.fixture
def tree(tmp_path: Path) -> VllmTree:
    package = tmp_path / "vllm" / "sub"
    package.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text('TABLE = {"Lazy": ".inner:Lazy"}')
    (tmp_path / "vllm" / "inner.py").write_text("class Passed: ...\n")
    (package / "__init__.py").write_text("from .base import Child\nfrom ..inner import Passed\n")
    (package / "base.py").write_text(BASE)
    return VllmTree(tmp_path)


def test_the_installed_vllm_has_all_that_is_used() -> None:
    assert lacking_in(VllmTree(installed_vllm())) == []


def test_a_release_that_lost_something_is_told_from_one_that_has_it(tmp_path: Path) -> None:
    for module in {need.module for need in NEEDS}:
        relative = Path(*module.split("."))
        source = installed_vllm() / relative
        target = tmp_path / relative
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.with_suffix(".py"), target.with_suffix(".py"))
    outputs = tmp_path / "vllm" / "outputs.py"
    outputs.write_text(outputs.read_text().replace("data:", "values:").replace("weight_versions", "marks"))
    tasks = tmp_path / "vllm" / "tasks.py"
    tasks.write_text(tasks.read_text().replace("token_embed", "token_vectors"))
    found = VllmTree(tmp_path)
    needs = unmet_needs(found)
    assert "vllm.outputs.PoolingOutput has no 'data'" in needs
    assert "vllm.tasks knows no 'token_embed'" in needs
    assert any("CompletionOutput has no 'weight_versions', and" in line for line in spared_in(found))


def test_a_name_is_found_where_it_is_passed_on_from(tree: VllmTree) -> None:
    assert tree.has("vllm.sub", "Child")
    assert tree.has("vllm.sub", "Passed")
    assert tree.has("vllm.sub.base", "Renamed")
    assert tree.has("vllm.sub.base", "fallback")
    assert tree.has("vllm", "Lazy")
    assert tree.has("vllm", "inner")
    assert not tree.has("vllm.sub", "Parent")
    assert not tree.has("vllm.gone", "Child")


def test_members_and_parameters_come_from_base_classes_too(tree: VllmTree) -> None:
    assert tree.members("vllm.sub", "Child") == {"__init__", "act", "kept", "later"}
    assert tree.takes("vllm.sub", "Child.act") == {"self", "first", "second"}
    assert {"own", "kept"} <= tree.takes("vllm.sub", "Child")
    assert not tree.has("vllm.sub", "Gone")


def test_a_class_leaves_to_its_subclasses_what_it_does_not_fill_itself(tree: VllmTree) -> None:
    assert tree.abstract("vllm.sub.base", "Wanting") == {"send", "receive"}
    assert tree.abstract("vllm.sub.base", "Half") == {"send"}
    assert tree.abstract("vllm.sub.base", "Child") == set()
