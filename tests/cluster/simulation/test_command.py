import json
from pathlib import Path

import msgspec
import pytest

from cluster.cli import main
from cluster.simulation.rates import LearnerRates, Rates, RolloutRates, TeacherRates
from tests.builders import MINIMAL_RUN
from tests.cluster.simulation.rates_builder import make_rates
from tests.cluster.simulation.test_measured_rates import a_runs_spans, rates_of_spans


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL_RUN)
    return str(path)


@pytest.fixture
def rates_file(tmp_path: Path) -> str:
    path = tmp_path / "measured.json"
    path.write_bytes(msgspec.json.encode(make_rates()))
    return str(path)


def test_a_plan_says_how_long_the_run_files_own_sizes_take(
    run_file: str, rates_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [run_file, "prompts.prompts_per_step=4", "rollout.rows_per_batch=4", "--rates", rates_file]
    assert main(["plan", *arguments]) == 0
    # Written in 1 s, read in 0.44 s, learned from in 0.044 s.
    assert capsys.readouterr().out.splitlines() == [
        "run file: rollout=1 teachers.main=1 learner=1 (3 GPUs)",
        "  step 1.484 s, 270 completion tokens/s",
        "  idle: rollout 33%, teachers.main 70%, learner 97%",
    ]


def test_a_plan_shares_gpus_out_and_draws(run_file: str, rates_file: str, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    arguments = [run_file, "--rates", rates_file, "--gpus", "6", "--picture", str(picture)]
    assert main(["plan", *arguments, "prompts.prompts_per_step=16"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_as_json_has_every_pool(run_file: str, rates_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [run_file, "--rates", rates_file, "--gpus", "6", "--json", "prompts.prompts_per_step=16"]
    assert main(["plan", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["best"]["gpus"].values()) == 6
    assert found["best"]["step_seconds"] < found["run_file"]["step_seconds"]
    assert set(found["best"]["idle_shares"]) == {"rollout", "teachers.main", "learner"}


def test_a_run_directory_stands_for_its_rates_and_they_can_be_kept(run_file: str, tmp_path: Path) -> None:
    directory, kept = tmp_path / "run", tmp_path / "kept.json"
    directory.mkdir()
    rates = rates_of_spans(a_runs_spans(), directory)
    arguments = ["--rates", str(directory), "--save-rates", str(kept), "prompts.prompts_per_step=4"]
    assert main(["plan", run_file, *arguments]) == 0
    assert msgspec.json.decode(kept.read_bytes(), type=Rates) == rates


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("teachers.main.num_workers=0", "plan with teachers.main.num_workers=1"),
        ("teachers={main={model='a',slot='s'},code={model='b',slot='s'}}", "take turns in the slot 's', which a plan"),
        ("rollout.privileged={sampler='main'}", "teachers.main writes for hard prompts, whose number nothing predicts"),
        ("ray.share_gpu=true", "a plan gives every pool GPUs of its own; plan with ray.share_gpu=false"),
    ],
)
def test_what_a_plan_cannot_show_is_refused_in_one_sentence(
    run_file: str, rates_file: str, override: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", run_file, override, "--rates", rates_file, "--gpus", "8"]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.timeout(60)  # seconds; a clock that were asked at every simulated second would take years
@pytest.mark.parametrize(
    "rates",
    [
        make_rates(rollout=RolloutRates(((1, 1e9),), (10.0,), (100.0,))),
        make_rates(rollout=RolloutRates(((1, 1e-9),), (10.0,), (1e9,)), sync_seconds=1e29),
        make_rates(teachers={"main": TeacherRates(1e-9)}, learner=LearnerRates(1e-9), seconds_per_call=1e29),
    ],
    ids=["slow to write", "slow to bring weights", "slow to read and to learn"],
)
def test_a_plan_of_absurd_rates_ends_too(run_file: str, tmp_path: Path, rates: Rates) -> None:
    path = tmp_path / "absurd.json"
    path.write_bytes(msgspec.json.encode(rates))
    assert main(["plan", run_file, "--rates", str(path), "--gpus", "16", "prompts.prompts_per_step=16"]) == 0
