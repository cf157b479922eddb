import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cluster.config.presets import PRESETS
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.config.run_file import parse_run_config
from cluster.run.model_readme import MARK, add_readme, make_readme, settings
from tests.builders import make_config

HUB_RUN = """
student.model = "Qwen/Qwen3-1.7B-Base"
prompts = { train = "openai/gsm8k/main", held_out = "openai/gsm8k/main:test", columns = { prompt = "question" } }
objective.preset = "gkd"
learner.learning_rate = 1e-5
rollout.engine.extra = { kv_cache_dtype = "fp8" }

[teachers.math]
model = "Qwen/Qwen3-8B"

[teachers."v1.5"]
model = "org/other"
"""
SECRETS = (
    "run.directory=/home/someone/runs",
    "student.model=/home/someone/student",
    "teachers.main.model=/home/someone/teacher",
    "teachers.main.url=http://gpu7.internal:8000/v1",
    "teachers.main.tokenizer=/home/someone/teacher",
    "teachers.main.api_key_env=SOMEONES_KEY",
    "prompts.train=/home/someone/prompts.jsonl",
    'rollout.engine.extra={ download_dir = "/home/someone/cache" }',
    "logging.wandb_project=secret-project",
    "ray.address=10.0.0.7:6379",
)


def toml_of(card: str) -> str:
    [block] = re.findall(r"^```toml\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_front_matter_is_what_the_hub_reads_and_leaves_the_licence_open(tmp_path: Path) -> None:
    add_readme(tmp_path, RunDirectory(tmp_path), parse_run_config(HUB_RUN), step=40, say=pytest.fail)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-1.7B-Base"
    assert card.data.datasets == ["openai/gsm8k"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.license is None
    assert "`Qwen/Qwen3-1.7B-Base` after 40 of 100 steps of on-policy distillation" in card.text
    assert "| teachers | math (`Qwen/Qwen3-8B`), v1.5 (`org/other`) |" in card.text
    assert "| objective | preset gkd; Jensen-Shannon divergence of student and target over the whole vocab" in card.text
    assert re.search(r"Packages: .*torch \d+\.\d+.*transformers \d+\.\d+", card.text)
    assert "## Measured" not in card.text  # no step says


def test_the_settings_shown_make_the_same_run_again() -> None:
    config = parse_run_config(HUB_RUN)
    assert parse_run_config(toml_of(make_config_card(config))) == config
    assert settings(make_config()) == (
        'student.model = "student"\nprompts.train = "train.jsonl"\nteachers.main.model = "teacher"\n'
    )


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_settings_of_every_preset_make_its_objective_again(preset: str) -> None:
    config = make_config(f"objective={preset}", "teachers.main.base=other", "teachers.other.model=other")
    assert parse_run_config(settings(config)).objective == config.objective
    assert f"| objective | preset {preset}; " in make_config_card(config)


def make_config_card(config: Config) -> str:
    return make_readme(config, [{"step": 1, "train/kl": 2.0}, {"step": 2, "train/kl": 0.25}], step=2, start={})


def test_a_card_has_no_absolute_path_no_server_and_no_project() -> None:
    card = make_config_card(make_config(*SECRETS))
    for secret in ("someone", "gpu7", "SOMEONES_KEY", "secret-project", "10.0.0.7", str(Path.cwd())):
        assert secret not in card
    assert 'rollout.engine.extra.download_dir = "cache"' in toml_of(card)
    assert ModelCard(card).data.base_model is None  # a folder is no model of the hub


def test_versions_are_those_that_the_run_began_with_and_weights_may_move() -> None:
    weight = "objective.terms.main.weight={from=1, to=0, over_steps=5}"
    config = make_config("objective.terms.main.loss=divergence", weight)
    text = make_readme(config, [], step=2, start={"packages": {"torch": "1.2.3"}})
    assert "Packages: torch 1.2.3." in text
    assert parse_run_config(settings(config)).objective == config.objective


def test_a_file_of_the_user_stays_and_one_of_ours_is_written_anew(tmp_path: Path) -> None:
    path, directory = tmp_path / "README.md", RunDirectory(tmp_path)
    for text, stays in (("my own words", True), (f"{MARK}\nof an earlier export", False)):
        path.write_text(text)
        add_readme(tmp_path, directory, make_config(), step=1, say=pytest.fail)
        assert (path.read_text() == text) is stays


def test_a_card_that_cannot_be_written_costs_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "README.md").mkdir()
    add_readme(tmp_path, RunDirectory(tmp_path), make_config(), step=1, say=said.append)
    [line] = said
    assert line.startswith(f"{tmp_path / 'README.md'}: it cannot be written: ")


def test_what_breaks_tables_is_escaped() -> None:
    assert r"| teachers | main (`a\|b`) |" in make_config_card(make_config("teachers.main.model=a|b"))
