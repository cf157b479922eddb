"""Every command that README and the documents show runs in a test, or says what it needs.

Every TOML block is a part of a run file, and every Python block of the source.

A comment above a code block, `<!-- needs: a GPU -->`, exempts its lines from running, not from being parsed.
"""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from cluster.cli import main, make_parser
from cluster.config.run_directory import RunDirectory
from cluster.config.run_file import config_from_json
from cluster.contracts.files import RecordsFile
from cluster.demo import EMBEDDED
from cluster.elastic.scale import parse_sizes
from cluster.monitoring.status_file import KeptStatus, change_status
from tests.builders import MINIMAL_RUN, make_config
from tests.test_docs import DOCUMENTS, ROOT

BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
SPAN = re.compile(r"`((?:preceptor|make|(?:\.venv/bin/)?python -m) [^`]+)`")
NEEDS = {"a GPU", "GPUs", "a cluster", "a network"}
VALUES = {"N": "1", "GIB": "80", "JOB_ID": "raysubmit_1"}  # of placeholders whose form is checked

# Where commands run that need engines, a server or a whole run: the command's options, and a test that has them all.
RUNS_IN = {
    "preceptor check": "end_to_end/test_training.py",
    "preceptor demo": "end_to_end/runs.py",
    "preceptor eval": "end_to_end/test_training.py",
    "preceptor export --step": "cluster/run/test_export.py",
    "preceptor export --push-to-hub --step --to": "cluster/run/test_export.py",
    "preceptor init --data --student --teacher": "cluster/test_init.py",
    "preceptor plan --gpus --picture --rates --save-rates": "cluster/simulation/test_command.py",
    "preceptor plan --gpus --rates": "cluster/simulation/test_command.py",
    "preceptor plan --rates": "cluster/simulation/test_command.py",
    "preceptor rows --where": "cluster/run/test_rows.py",
    "preceptor scale": "cluster/elastic/test_scale.py",
    "preceptor teacher": "cluster/elastic/test_replace_teacher.py",
    "preceptor train": "end_to_end/test_two_teachers.py",
    "preceptor train --resume": "end_to_end/test_training.py",
    "preceptor verify": "end_to_end/test_verify.py",
    "make demo": "end_to_end/runs.py",
    "make install": "cluster/install/test_install.py",
    "python -m tests.compat.vllm_names": "compat/test_vllm_names.py",
}
# What runs the tests cannot run in one of them: CONTRIBUTING.md says when, and CI runs it.
DEVELOPMENT = re.compile(
    r"make (test|test-all|chaos|check|bench|docs)|python -m (pytest|tests|benchmarks|examples)\b.*|python -m vllm\..*"
)


class Command(NamedTuple):
    """One command of a document."""

    document: Path
    text: str
    needs: str = ""  # "": it must run in a test
    is_line: bool = False  # of a block, so that it can be pasted into a shell

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.text}"

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
            words.pop(0)
        return [VALUES.get(word, word) for word in words]

    @property
    def form(self) -> str:
        """Return the command with its options alone."""
        words = self.words
        size = 3 if words[:2] == ["python", "-m"] else 2
        return " ".join([*words[:size], *sorted({word for word in words[size:] if word.startswith("--")})])


def blocks(language: str) -> Iterator[tuple[Path, str, str]]:
    """Yield document, text and needs of each block."""
    for document in DOCUMENTS:
        for block in BLOCK.finditer(document.read_text(encoding="utf-8")):
            if block["language"] == language:
                yield document, block["text"], block["needs"] or ""


def commands() -> Iterator[Command]:
    for document, text, needs in blocks("sh"):
        for line in text.splitlines():
            for part in re.sub(r"\s*#.*", "", line).removesuffix("&").split("&&"):
                if part.strip():
                    yield Command(document, part.strip().replace(".venv/bin/", ""), needs, is_line=True)
    for document in DOCUMENTS:
        prose = BLOCK.sub("", document.read_text(encoding="utf-8"))
        for span in SPAN.findall(prose):
            yield Command(document, " ".join(span.split()).replace(".venv/bin/", "").translate({91: None, 93: None}))


ALL = list(commands())
PRECEPTOR = [command for command in ALL if command.words[0] == "preceptor" and len(command.words) > 1]


@pytest.mark.parametrize("command", PRECEPTOR, ids=str)
def test_every_preceptor_command_is_one_that_the_command_line_takes(command: Command) -> None:
    words = command.words[1:]
    if not command.is_line and len(words) == 1:  # a name in a sentence
        with pytest.raises(SystemExit) as ended:
            make_parser().parse_args([*words, "--help"])
        assert ended.value.code == 0
        return
    options = make_parser().parse_args(words)
    settings = [text for text in getattr(options, "arguments", []) if "=" in text]
    assert make_config(*(setting.replace("=N", "=1") for setting in settings)) is not None
    if words[0] == "scale":
        assert parse_sizes(options.sizes)


@pytest.mark.parametrize("command", [command for command in ALL if command.words[0] == "make"], ids=str)
def test_every_target_of_make_is_there(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in command.words[1:])


def runs_here(command: Command) -> bool:
    return (
        command.form.split()[1] in ("compare", "report", "status")
        or command.form == "preceptor plan --gpu-memory --gpus"
    )


@pytest.mark.parametrize("command", [command for command in ALL if command.is_line and not command.needs], ids=str)
def test_every_line_of_a_block_runs_in_a_test_or_says_what_it_needs(command: Command) -> None:
    if runs_here(command) or DEVELOPMENT.fullmatch(command.text):
        return
    assert command.form in RUNS_IN, "name a test in RUNS_IN, or put `<!-- needs: a GPU -->` above the block"


@pytest.mark.parametrize(("form", "test"), RUNS_IN.items())
def test_the_tests_that_are_named_have_the_command_and_its_options(form: str, test: str) -> None:
    text = (ROOT / "tests" / test).read_text(encoding="utf-8")
    words = form.replace("make demo", "preceptor demo").split()[1:]
    missing = [word for word in words if word != "-m" and not re.search(rf"[\"/ .]{re.escape(word)}[\" ]", text)]
    assert not missing or test.startswith(("cluster/install", "compat"))
    assert form in {command.form for command in ALL}, "no document shows it any more"


def test_needs_are_said_in_the_same_words() -> None:
    assert {need for command in ALL for need in command.needs.split(", ") if need} <= NEEDS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with what commands name: prompts.jsonl, RUN.toml and runs that have ended."""
    monkeypatch.chdir(tmp_path)
    lines = (EMBEDDED / "train.jsonl").read_text().splitlines(keepends=True)
    Path("prompts.jsonl").write_text("".join(lines[:64]))
    models = f'student.model = "{EMBEDDED}/student"\nteachers.main.model = "{EMBEDDED}/teacher"\n'
    prompts = 'prompts = { train = "prompts.jsonl", template = "raw" }\nrollout.max_completion_tokens = 24\n'
    Path("RUN.toml").write_text(models + prompts)
    for name in ("run", "other", "a", "b"):
        directory = RunDirectory.create(make_config("run.steps=3", f"run.name={name}"))
        with KeptStatus(directory.status, steps=3):
            RecordsFile(directory.metrics).write({"step": 3, "train/kl": 0.5})
            change_status(directory.status, state="running", step=3)
    return tmp_path


HERE = sorted({command.text for command in ALL if command.is_line and not command.needs and runs_here(command)})


@pytest.mark.parametrize("text", HERE)
def test_commands_that_need_no_engine_run_as_they_are_shown(text: str, folder: Path) -> None:
    assert main(shlex.split(text, comments=True)[1:]) == 0


TOML = [(document, text) for document, text, _ in blocks("toml")]


@pytest.mark.parametrize(
    ("document", "text"), TOML, ids=[f"{document.name}-{i}" for i, (document, _) in enumerate(TOML)]
)
def test_every_toml_block_is_a_part_of_a_run_file(document: Path, text: str) -> None:
    tree: dict[str, Any] = tomllib.loads(text)
    defaults = tomllib.loads(MINIMAL_RUN)
    for name, section in defaults.items():
        tree[name] = {**section, **tree.get(name, {})}
    for teacher in tree["teachers"].values():
        if "from" not in teacher:
            teacher.setdefault("model", "teacher")
    if "base" in text:
        tree["teachers"]["before"] = {"model": "before"}
        tree["teachers"]["main"].setdefault("base", "before")
    assert config_from_json(msgspec.json.encode(tree).decode(), source=document.name) is not None


def without_docstrings(text: str) -> ast.Module:
    module = ast.parse(text)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return module


SHOWN = [ROOT / "cluster" / "run" / "driver.py", *(ROOT / "examples" / "extend").glob("*.py")]
PYTHON = [(document, text) for document, text, _ in blocks("python")]


@pytest.mark.parametrize(("document", "text"), PYTHON, ids=[document.name for document, _ in PYTHON])
def test_every_python_block_is_a_part_of_the_source(document: Path, text: str) -> None:
    nodes = [node for path in SHOWN for node in ast.walk(without_docstrings(path.read_text(encoding="utf-8")))]
    source = {ast.dump(node) for node in nodes if isinstance(node, ast.stmt)}
    assert not [ast.unparse(node) for node in without_docstrings(text).body if ast.dump(node) not in source]


LINK = re.compile(r"https?://[^\s)>`\"']+")
# A host and a path, without what a sentence puts behind it.
EXTERNAL = re.compile(r"https://[\w-]+(\.[\w-]+)+(/[\w.~%#?=&+@:/-]*[\w/])?")
EXAMPLE = re.compile(r"https?://(head|gpu\d|localhost|127\.0\.0\.1|HOST|host)(:\d+)?(/\w*)*")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_external_link_is_a_whole_address(document: Path) -> None:
    links = [link.rstrip(".,;") for link in LINK.findall(document.read_text(encoding="utf-8"))]
    assert not [link for link in links if not EXTERNAL.fullmatch(link) and not EXAMPLE.fullmatch(link)]


def test_the_site_shows_every_document_and_its_tools_are_in_no_lock() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index"} <= set(index.split()), "add the page to a toctree of docs/index.md"
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["docs"]
    for lock in (ROOT / "cluster" / "install").glob("*.lock"):
        assert not {name.split("==")[0] for name in group} & {line.split("==")[0] for line in lock.read_text().split()}
