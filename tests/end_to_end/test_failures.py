"""An engine that fails inside a step ends a run, or a command, with its own last error; the rest is in RUN/logs."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.demo import EMBEDDED
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


def narrow_heads(folder: Path) -> Path:
    """Copy the embedded student with heads of width 16, which vLLM refuses on a CPU when it first attends."""
    shutil.copytree(EMBEDDED / "student", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    norms = {
        name: value[:16].clone() for name, value in weights.items() if name.endswith(("q_norm.weight", "k_norm.weight"))
    }
    save_file(weights | norms, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_first_step_of_a_model_that_vllm_cannot_run_says_why(preloaded: None, tmp_path: Path) -> None:
    files = (f"teachers.countdown.model={EMBEDDED / 'teacher'}", f"prompts.train={EMBEDDED / 'train.jsonl'}")
    narrow = (f"student.model={narrow_heads(tmp_path / 'narrow')}", f"run.directory={tmp_path}", "run.name=run")
    few = (
        f"prompts.held_out={EMBEDDED / 'held_out.jsonl'}",
        "evaluation.num_prompts=4",
        "evaluation.teacher_too=false",
    )
    finished = preceptor("eval", str(EMBEDDED / "demo.toml"), *files, *narrow, *few, "ray.dashboard=false")
    assert finished.code == 1
    assert "the process of a rollout engine is gone; its last error: " in finished.error
    assert "head" in finished.error.partition("its last error: ")[2]
    log = tmp_path / "run/logs/rollout-0.log"
    assert f"its output is in {log}" in finished.error
    assert "Traceback (most recent call last)" in log.read_text()


@pytest.mark.exhaustive
def test_an_error_inside_a_step_is_read_within_seconds_and_ends_the_run_when_it_comes_again(tmp_path: Path) -> None:
    plugin, failing = tmp_path / "plugin", tmp_path / "failing"
    info = plugin / "failing_plugin-1.dist-info"
    info.mkdir(parents=True)
    (plugin / "failing_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfailing = failing_plugin:register\n")
    path = os.pathsep.join([str(plugin), *filter(None, [os.environ.get("PYTHONPATH")])])
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
