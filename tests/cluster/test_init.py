"""`preceptor init` writes a run file that starts, and says why."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config.methods import METHODS
from cluster.config.run_config import Config
from cluster.config.run_file import load_run_config, parse_run_config
from cluster.demo import EMBEDDED, embedded_config
from cluster.placement.proposal import warning_of_dtype
from cluster.run.inputs import load_inputs
from tests.end_to_end.runs import preceptor
from tests.teacher_workers.backends.fake_server import FakeServer
from tests.tiny_qwen3 import write_tiny_qwen3

PAIR = ("--student", str(EMBEDDED / "student"), "--teacher", str(EMBEDDED / "teacher"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Write some of the embedded prompts, and held-out ones beside them."""
    for name in ("train", "held_out"):
        lines = (EMBEDDED / f"{name}.jsonl").read_text().splitlines()[:40]
        (tmp_path / f"my_{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "my_train.jsonl"


def init(data: Path, *options: str) -> Config:
    """Write a run file for the embedded pair and return it as a run reads it."""
    out = data.with_name("run.toml")
    assert main(["init", *PAIR, "--data", str(data), "--out", str(out), *options]) == 0
    return load_run_config(out)


def test_the_embedded_pair_gets_a_short_run_file_with_reasons(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = init(prompts, "--gpus", "0")
    assert config.prompts.template == "raw"  # its tokenizer has no chat template
    assert config.prompts.held_out == str(prompts.with_name("my_held_out.jsonl"))
    assert config.environment.verifier == "regex"  # its answers are patterns
    assert (config.learner.dtype, config.learner.learning_rate) == ("float32", 1e-3)  # 0.3 million parameters
    inputs = load_inputs(config)
    assert inputs.max_model_len <= 128  # the context of both
    written = prompts.with_name("run.toml").read_text()
    settings = [line for line in written.splitlines() if " = " in line and not line.startswith("#")]
    assert len(settings) <= 25
    said = capsys.readouterr().out
    assert "the student's tokenizer has no chat template" in written
    assert 'prompts.template = "raw": the student\'s tokenizer has no chat template' in said
    assert "prompts have 10 tokens (median)" in said
    assert f"{prompts.with_name('run.toml')} is written" in said


@pytest.mark.parametrize("lacks", [True, False])
def test_a_cpu_without_bfloat16_gets_float32(prompts: Path, monkeypatch: pytest.MonkeyPatch, lacks: bool) -> None:
    monkeypatch.setattr("cluster.placement.proposal.SMALL_PARAMETERS", 0)
    monkeypatch.setattr("cluster.models.lm_head.lacks_bfloat16", lambda: lacks)
    config = init(prompts, "--gpus", "0")
    engines = (config.rollout.engine, config.teachers["main"].engine)
    assert {config.learner.dtype, *(engine.dtype for engine in engines)} == {"float32" if lacks else "bfloat16"}
    assert warning_of_dtype(config, on_gpu=False) is None  # what is written is right here


def test_a_run_file_of_another_machine_is_warned_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.models.lm_head.lacks_bfloat16", lambda: True)
    config = embedded_config(["rollout.engine.dtype=bfloat16"])
    assert "use float32" in (warning_of_dtype(config, on_gpu=False) or "")
    assert warning_of_dtype(config, on_gpu=True) is None


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.toml"
    out.write_text("mine")
    assert main(["init", *PAIR, "--data", str(EMBEDDED / "train.jsonl"), "--out", str(out)]) == 1
    assert out.read_text() == "mine"
    assert capsys.readouterr().err == f"preceptor: {out}: is there already; name another file with --out\n"


def test_one_gpu_is_shared(prompts: Path) -> None:
    one = init(prompts, "--gpus", "1", "--gpu-memory", "24")
    assert one.ray.share_gpu
    engines = (one.rollout.engine, one.teachers["main"].engine)
    fractions = [one.learner.gpu_memory_fraction, *(engine.gpu_memory_fraction or 0 for engine in engines)]
    # Three contexts, logits and caches: models this small leave most of the GPU free.
    assert 0.2 < sum(fractions) <= 0.95
    assert all(engine.kv_cache_gib for engine in engines)


@pytest.mark.parametrize(("name", "found"), [("141", "139.0"), ("24", "23.5")])
def test_a_run_file_for_a_gpu_by_its_name_fits_what_such_a_gpu_has(
    prompts: Path, capsys: pytest.CaptureFixture[str], name: str, found: str
) -> None:
    init(prompts, "--gpus", "1", "--gpu-memory", name)
    assert f"planned with {0.97 * float(name):.1f} GiB of each GPU" in capsys.readouterr().out
    assert main(["plan", str(prompts.with_name("run.toml")), "--gpus", "1", "--gpu-memory", found]) == 0


def test_eight_gpus_are_divided(prompts: Path) -> None:
    eight = init(prompts, "--gpus", "8", "--gpu-memory", "80")
    pools = (eight.rollout.num_workers, eight.teachers["main"].num_workers, eight.learner.num_workers)
    assert pools == (5, 1, 2)
    assert not eight.ray.share_gpu


@pytest.mark.parametrize(
    ("answers", "verifier"),
    [
        (["42", "1,000", "-3.5"], "math"),
        ([r"\frac{1}{2}", "$x$"], "math"),
        (["Rome", "Paris"], "exact"),
        (["(A)", "(B)"], "exact"),  # begin like formulas, and math-verify reads none in them
        ([".*", r"\d+", "(?:a)", "("], "exact"),  # patterns but for the last
    ],
)
def test_answers_choose_the_verifier(tmp_path: Path, answers: list[str], verifier: str) -> None:
    lines = [f'{{"prompt": "12 : 27 25", "answer": {json.dumps(answer)}}}' for answer in answers]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    assert init(tmp_path / "mine.jsonl", "--gpus", "0").environment.verifier == verifier


def test_a_place_that_cannot_be_written_to_is_one_sentence(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prompts.parent / "absent/run.toml"
    assert main(["init", *PAIR, "--data", str(prompts), "--out", str(out), "--gpus", "0"]) == 1
    assert capsys.readouterr().err == f"preceptor: {out}: cannot write the run file: No such file or directory\n"


@pytest.mark.exhaustive
def test_a_run_file_of_the_embedded_pair_trains_without_an_edit(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(prompts, "--gpus", "0")
    monkeypatch.chdir(prompts.parent)
    # In a process of its own: this one may have a Ray cluster already.
    found = preceptor("train", "run.toml", "run.steps=2", "ray.dashboard=false")
    assert found.code == 0, found.output + found.error
    assert len((prompts.parent / "runs/run/metrics.jsonl").read_text().splitlines()) == 2


def test_a_gpu_that_is_too_small_is_one_sentence(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prompts.with_name("run.toml")
    machine = ("--gpus", "1", "--gpu-memory", "4")
    assert main(["init", *PAIR, "--data", str(prompts), "--out", str(out), *machine]) == 1
    assert capsys.readouterr().err.startswith("preceptor: one GPU of 4 GiB does not hold the run: the learner takes ")
    assert not out.exists()


def test_turns_that_end_at_different_tokens_are_accepted_in_the_file(prompts: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(EMBEDDED / "teacher", teacher)
    for name, field, eos in (
        ("tokenizer_config.json", "eos_token", "<bos>"),
        ("generation_config.json", "eos_token_id", 1),
    ):
        content = json.loads((teacher / name).read_text())
        (teacher / name).write_text(json.dumps({**content, field: eos}))
    out = tmp_path / "eos.toml"
    pair = ("--student", str(EMBEDDED / "student"), "--teacher", str(teacher))
    assert main(["init", *pair, "--data", str(prompts), "--out", str(out), "--gpus", "0"]) == 0
    assert load_run_config(out).teachers["main"].accept_differences == ("eos",)


def test_a_pair_that_cannot_be_one_stays_refused(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_qwen3(tmp_path / "other")
    pair = ("--student", str(EMBEDDED / "student"), "--teacher", str(tmp_path / "other"))
    assert main(["init", *pair, "--data", str(prompts), "--out", str(tmp_path / "run.toml")]) == 1
    assert "its tokenizer is not the student's" in capsys.readouterr().err
    assert not (tmp_path / "run.toml").exists()


def init_served(prompts: Path, url: str, *options: str) -> int:
    pair = ("--student", str(EMBEDDED / "student"), "--teacher", url)
    return main(["init", *pair, "--data", str(prompts), "--out", str(prompts.with_name("run.toml")), *options])


@pytest.mark.parametrize("gpus", ["0", "1", "4"])
def test_a_url_is_a_teacher_that_needs_no_gpu(prompts: Path, capsys: pytest.CaptureFixture[str], gpus: str) -> None:
    with FakeServer(max_model_len=64) as server:
        assert init_served(prompts, server.url, "--gpus", gpus, "--gpu-memory", "24") == 0
    config = load_run_config(prompts.with_name("run.toml"))
    teacher = config.teachers["main"]
    assert (teacher.url, teacher.model, teacher.engine.tensor_parallel) == (server.url, "big", 0)
    said = capsys.readouterr().out
    assert f"teacher {server.url}: served there" in said
    assert "the context 64" in said  # the server's, which is shorter than the student's
    assert config.ray.share_gpu == (gpus == "1")
    assert config.rollout.num_workers == {"0": 1, "1": 1, "4": 3}[gpus]  # the learner has one


def test_of_a_server_with_several_models_one_must_be_named(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Several(FakeServer):
        def models(self, key: str | None) -> tuple[int, bytes]:
            return 200, json.dumps({"data": [{"id": name} for name in ("small", self.model)]}).encode()

    with Several() as server:
        assert init_served(prompts, server.url, "--gpus", "0") == 1
        assert capsys.readouterr().err == (
            f"preceptor: {server.url} serves small, big; name one of them with --teacher-model\n"
        )
        assert init_served(prompts, server.url, "--gpus", "0", "--teacher-model", "big") == 0


def test_a_url_without_a_host_is_one_sentence(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init_served(prompts, "http://") == 1
    said = "preceptor: --teacher: url is 'http:'; expected http:// or https://, a host"
    assert capsys.readouterr().err.startswith(said)


def test_options_of_servers_are_refused_for_other_teachers(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(prompts.with_name("run.toml"))
    assert main(["init", *PAIR, "--data", str(prompts), "--out", out, "--api-key-env", "KEY"]) == 1
    assert "--api-key-env are for a URL, found --teacher" in capsys.readouterr().err


def test_remote_code_is_trusted_where_init_is_told_so(prompts: Path) -> None:
    config = init(prompts, "--gpus", "0", "--trust-remote-code")
    assert config.student.trust_remote_code
    assert config.teachers["main"].trust_remote_code


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"opcd"}))  # which compares more tokens than there are
def test_a_method_without_a_teacher_lets_the_student_teach_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    data, out = tmp_path / "mine.jsonl", tmp_path / "run.toml"
    data.write_text('{"prompt": "12 : 27 25", "answer": "39 - 27", "experience": "12"}\n' * 40)
    student = str(EMBEDDED / "student")
    options = ("--student", student, "--method", method, "--gpus", "0")
    assert main(["init", *options, "--data", str(data), "--out", str(out)]) == 0
    config = load_run_config(out)
    assert (config.method, config.teachers["main"].source) == (method, "student")
    written = parse_run_config(f'method = "{method}"\nstudent.model = "s"\nprompts.train = "p"')
    assert config.objective == written.objective
    assert config.teachers["main"].refresh == written.teachers["self"].refresh
    inputs = load_inputs(config)
    assert inputs.scoring_model_len("main") <= 128  # the context
    assert "teacher student: qwen3" in capsys.readouterr().out


def test_neither_teacher_nor_method_is_one_sentence(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(prompts.with_name("run.toml"))
    assert main(["init", "--student", str(EMBEDDED / "student"), "--data", str(prompts), "--out", out]) == 1
    assert capsys.readouterr().err.startswith("preceptor: name a teacher with --teacher, or a method with --method: ")
