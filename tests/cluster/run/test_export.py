"""`preceptor export` turns the checkpoint of a run into a directory that transformers loads, without an engine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MixtralConfig

from cluster.cli import main
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError
from cluster.contracts.files import RecordsFile
from cluster.models.weight_files import weight_files
from cluster.run.export import push
from cluster.run.model_readme import MARK
from learner.checkpointing import checkpoint
from learner.checkpointing.manifest import Layout, shard_name
from learner.checkpointing.shards import write_shard
from learner.engines.torch import ReferenceEngine
from learner.model.student import load_student
from tests.builders import make_config
from tests.learner.checkpointing.checkpoints import run_state
from tests.tiny_qwen3 import NUM_WORDS, write_tiny_qwen3


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny")
    settings = {"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}  # which transformers loads, but does not save
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


class Run:
    """A run that was killed after its checkpoints of steps 2 and 4, whose weights are 0.5 and 0.25 everywhere."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.config = make_config(
            f"student.model={model}",
            f"run.directory={folder / 'runs'}",
            "learner.zero_stage=0",
            "learner.dtype=bfloat16",
            "rollout.stop_token_ids=[3]",
        )
        self.directory = RunDirectory.create(self.config)
        engine = ReferenceEngine(load_student(self.config.student, self.config.learner), self.config.learner)
        for step, value in ((2, 0.5), (4, 0.25)):
            state = {name: torch.full_like(tensor, value) for name, tensor in engine.snapshot().items()}
            self.write(step, state)

    def write(self, step: int, state: dict[str, torch.Tensor]) -> None:
        folder = checkpoint.step_folder(self.directory.checkpoints, step)
        entry = write_shard(checkpoint.begin(folder) / shard_name(0), state)
        checkpoint.commit(folder, run_state(step), Layout.of(self.config.learner), [entry])

    def export(self, *arguments: str) -> int:
        return main(["export", str(self.directory.path), *arguments])


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Run:
    return Run(tiny_model, tmp_path)


def weights_of(folder: Path) -> set[float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    return {value for parameter in model.parameters() for value in parameter.unique().tolist()}


def test_the_last_checkpoint_of_a_killed_run_becomes_a_model_that_loads(run: Run) -> None:
    assert run.export() == 0
    folder = run.directory.path / "export-step-4"
    assert weights_of(folder) == {0.25}
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.temperature, settings.do_sample) == ([1, 3], 0.9, True)


def test_any_step_goes_to_any_new_folder(run: Run, tmp_path: Path) -> None:
    assert run.export("--step", "2", "--to", str(tmp_path / "student")) == 0
    assert weights_of(tmp_path / "student") == {0.5}


def test_a_damaged_checkpoint_is_passed_over(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shard = run.directory.checkpoints / "step-4" / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run.export() == 0
    assert "passing over a damaged checkpoint" in capsys.readouterr().out
    assert weights_of(run.directory.path / "export-step-2") == {0.5}


def test_experts_are_written_one_by_one_as_the_students_files_have_them(tmp_path: Path) -> None:
    """The learner holds all experts of a layer in one tensor."""
    student = write_tiny_qwen3(tmp_path / "student")
    (student / "model.safetensors").unlink()
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    ids = {"vocab_size": NUM_WORDS, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    config = MixtralConfig(**sizes, **ids, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(student)
    run = Run(student, tmp_path)
    assert run.export() == 0
    exported = run.directory.path / "export-step-4"
    before, after = (weight_files(str(folder)).keys() for folder in (student, exported))
    assert before == after
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in after
    assert weights_of(exported) == {0.25}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--step", "3"], "has no checkpoint of step 3; there are: 2, 4"),
        (["--to", "."], "is there already; remove it, or choose another folder with --to"),
        (["--push-to-hub", "me/student"], "in the environment variable HF_TOKEN"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(
    arguments: list[str], says: str, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert run.export(*arguments) == 1
    assert says in capsys.readouterr().err


def test_a_run_without_checkpoints_has_nothing_to_export(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.directory.checkpoints)
    assert run.export() == 1
    assert "the run wrote no checkpoint" in capsys.readouterr().err


class Hub:
    """Keeps what was sent, as huggingface_hub's HfApi would send it."""

    def __init__(self, card: Path | None = None) -> None:
        self.sent: list[Any] = []
        self.card = card  # that the repository has

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        if "//" in repo_id:
            raise HFValidationError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'")
        self.sent.append((repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def file_exists(self, repo_id: str, name: str) -> bool:
        return self.card is not None and name == "README.md"

    def hf_hub_download(self, repo_id: str, name: str) -> str:
        return str(self.card)

    def upload_folder(
        self, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list[str] | None
    ) -> None:
        names = {path.name for path in folder_path.iterdir()} - set(ignore_patterns or ())
        self.sent.append((repo_id, sorted(names)))


def test_the_folder_is_sent_to_a_private_repository(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    hub = Hub()
    assert push(hub, tmp_path, "me/student") == "https://hub/me/student"  # type: ignore[arg-type]
    assert hub.sent == [("me/student", True, True), ("me/student", ["config.json"])]
    with pytest.raises(CheckpointError, match="is written, but could not be sent to the hub as me//student: Repo id"):
        push(hub, tmp_path, "me//student")  # type: ignore[arg-type]


def test_a_card_that_its_owner_wrote_in_the_repository_stays(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "README.md"):
        (folder / name).write_text(f"new\n{MARK}\n")
    ours, theirs = tmp_path / "ours.md", tmp_path / "theirs.md"
    ours.write_text(f"old\n{MARK}\n")
    theirs.write_text("---\nlicense: mit\n---\nmy own words\n")
    for card, sent in (
        (None, ["README.md", "config.json"]),
        (ours, ["README.md", "config.json"]),
        (theirs, ["config.json"]),
    ):
        hub = Hub(card)
        push(hub, folder, "me/student")  # type: ignore[arg-type]
        assert hub.sent[-1] == ("me/student", sent)


def test_an_export_has_a_model_card_with_the_metrics_until_its_step(run: Run) -> None:
    for step in range(1, 5):
        RecordsFile(run.directory.metrics).write({"step": step, "train/kl": 1.0 / step})
    assert run.export("--step", "2") == 0
    card = ModelCard.load(run.directory.path / "export-step-2" / "README.md")
    assert card.data.library_name == "transformers"
    assert "| KL to the teacher per token, step's own prompts | 1 (step 1) | 0.5 (step 2) |" in card.text
