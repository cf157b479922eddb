"""An engine that fails inside a step ends a run, or a command, with its own last error; the rest is in RUN/logs."""

import os
from pathlib import Path

import pytest

from cluster.demo import EMBEDDED
from cluster.nodes.preloaded_python import PYTHON_VARIABLE
from tests.end_to_end.conftest import SHORT
from tests.end_to_end.runs import ENDED_SECONDS, preceptor, running
from tests.leak_check import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

READ_SECONDS = 10.0  # after an engine's end the user knows why
PLUGIN = """
import os
from pathlib import Path


def register():
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    execute = UniProcExecutor.execute_model

    def fail(self, *arguments, **options):
        if Path(os.environ["FAILING_FILE"]).exists() and self.vllm_config.model_config.runner_type == "generate":
            raise RuntimeError("no kernel takes this step")
        return execute(self, *arguments, **options)

    UniProcExecutor.execute_model = fail
"""


def write_plugin(folder: Path) -> str:
    """Write a plugin whose engines fail once there is a file, and return a PYTHONPATH on which vLLM finds it."""
    info = folder / "failing_plugin-1.dist-info"
    info.mkdir(parents=True)
    (folder / "failing_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfailing = failing_plugin:register\n")
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_the_first_step_of_an_engine_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)  # what has imported already knows of no plugin
    monkeypatch.setenv("PYTHONPATH", write_plugin(tmp_path / "plugin"))
    monkeypatch.setenv("FAILING_FILE", str(tmp_path))  # is there from the first step on
    names = {"student.model": "student", "teachers.countdown.model": "teacher", "prompts.train": "train.jsonl"}
    files = [f"{name}={EMBEDDED / file}" for name, file in {**names, "prompts.held_out": "held_out.jsonl"}.items()]
    few = ("evaluation.num_prompts=4", "evaluation.teacher_too=false", f"run.directory={tmp_path}", "run.name=run")
    finished = preceptor("eval", str(EMBEDDED / "demo.toml"), *files, *few, "ray.dashboard=false")
    assert finished.code == 1
    # Whether the actor comes to say that its engine is gone, or is gone itself, the reason is there.
    assert "no kernel takes this step" in finished.error.partition("its last error: ")[2]
    log = tmp_path / "run/logs/rollout-0.log"
    assert f"its output is in {log}" in finished.error
    assert "Traceback (most recent call last)" in log.read_text()


@pytest.mark.exhaustive
def test_an_error_inside_a_step_is_read_within_seconds_and_ends_the_run_when_it_comes_again(tmp_path: Path) -> None:
    path, failing = write_plugin(tmp_path / "plugin"), tmp_path / "failing"
    settings = (*SHORT, "run.steps=100000", "evaluation.teacher_too=false", "evaluation.num_prompts=4")
    with running(tmp_path, *settings, PYTHONPATH=path, FAILING_FILE=str(failing)) as run:
        run.wait_for("step 2 ")
        failing.touch()
        error = "its last error: RuntimeError: no kernel takes this step"
        assert wait_until(lambda: any(error in line for line in run.lines), READ_SECONDS), "".join(run.lines)
        assert run.process.wait(2 * ENDED_SECONDS) == 1, "".join(run.lines)
        assert "is not started again, for it died of the same error before" in run.lines[-1]
        assert "no kernel takes this step" in next((run.directory / "logs").glob("rollout-0*.log")).read_text()
        assert run.left() == []
