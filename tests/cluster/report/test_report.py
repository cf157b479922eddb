"""The report of runs, as a file; `test_report_in_browser.py` opens it."""

import base64
import gzip
import json
import re
import stat
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.cli import main
from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.contracts.files import RecordsFile
from cluster.report.advice import advise
from cluster.report.report import write_report
from cluster.report.run_data import objective_in_words, read_run
from cluster.report.token_rows import MOST_TOKENS
from cluster.run.evaluation import write_samples
from tests.builders import make_config
from tests.cluster.report.support import keep, make_record, make_rows, make_run

HOSTILE = "</script><script>alert(1)</script><b>&amp;\u2028\u202eabc \u05d0 \N{GRINNING FACE} \0"


def data_of(path):
    """Return what the report's script is given."""
    packed = re.search(r'id="data">([^<]*)<', path.read_text(encoding="utf-8"))[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def text_of(path):
    """Return the report without its library, data, style and script."""
    return re.sub(r"<(script|style)[^>]*>.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_an_empty_run_says_what_is_missing(tmp_path):
    directory = make_run(tmp_path, state="starting")
    directory.starts.unlink()
    text = text_of(write_report([directory.path]))
    assert "No step is done yet, so there are no curves." in text
    assert "There are no answers to compare: there are no held-out prompts." in text
    assert "No tokens can be shown: none is kept yet" in text
    assert "Hardware and packages were not recorded" in text


def test_a_failed_run_says_why_without_the_path_of_its_directory(tmp_path):
    directory = make_run(tmp_path, steps=3, state="failed")
    text = text_of(write_report([directory.path]))
    assert "failed after step 3 of 100" in text
    assert "run/x: the disk is full" in text
    assert str(tmp_path) not in text


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    directory = make_run(tmp_path)
    with pytest.raises(ConfigError, match=r"/proc/none.html: cannot write the report: No such file .* with --out"):
        write_report([directory.path], Path("/proc/none.html"))


def test_a_run_that_goes_on_says_so(tmp_path):
    directory = make_run(tmp_path, steps=3, state="running")
    directory.status.write_text(directory.status.read_text().replace("elsewhere", "host"))
    directory.status.touch()
    assert "The run is not over: it shows what was there after step 3." in text_of(write_report([directory.path]))


def test_a_resumed_run_shows_when_and_where_it_went_on(tmp_path):
    directory = make_run(tmp_path, steps=6)
    RecordsFile(directory.starts).write({"step": 4, "at": 1.1e9, "hardware": "2 nodes", "placement": {"rollout": "3"}})
    report = write_report([directory.path])
    assert "resumed 1 times" in text_of(report)
    assert [(event["step"], event["kind"]) for event in data_of(report)[0]["events"]] == [(4, "start")]


@pytest.mark.parametrize(
    ("objective", "top", "sentence"),
    [
        ("thinking-machines", "sampled", "policy gradient over the sampled token"),
        (
            "tail-topk",
            None,
            "over the teacher&#39;s 16 most likely tokens, the rest as one, corrected by sampled tokens",
        ),
        ("gkd", "full", "Jensen-Shannon divergence of student and target over the whole vocabulary"),
    ],
)
def test_objectives_are_described_and_what_they_do_not_know_is_said(tmp_path, objective, top, sentence):
    directory = make_run(tmp_path, f"objective={objective}", steps=2)
    keep(directory, make_rows(1, [["a", " b", " c"]], top=top))
    report = write_report([directory.path])
    assert sentence in text_of(report)
    unknown = "asks the teacher for no tokens of its own choice" in text_of(report)
    assert unknown == (top == "sampled")
    [row] = data_of(report)[0]["tokens"]["rows"]
    assert ("teacher_top_ids" in row["lists"]) == (top == "full")
    assert ("candidate_ids" in row["lists"]) == (top is None)


def test_a_hostile_text_is_shown_and_does_nothing(tmp_path):
    directory = make_run(tmp_path, steps=1)
    keep(directory, make_rows(1, [["a", HOSTILE, "c"], ["p", "q", HOSTILE]]))
    write_samples(directory.samples, 0, "student", [{"trajectory_id": 0, "prompt": HOSTILE, "completion": HOSTILE}])
    report = write_report([directory.path])
    text = report.read_text(encoding="utf-8")
    assert "alert(1)" not in text.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
    assert "\0" not in text
    assert text.count("<script") == 3
    rows = data_of(report)[0]["tokens"]["rows"]
    assert rows[0]["texts"][1] == HOSTILE  # in the data it is as it was


def test_a_long_trajectory_is_cut_and_says_by_how_much(tmp_path):
    directory = make_run(tmp_path, steps=1)
    keep(directory, make_rows(1, [["x"] * 20_000]))
    report = write_report([directory.path])
    [row] = data_of(report)[0]["tokens"]["rows"]
    assert (len(row["texts"]), row["left_out"]) == (MOST_TOKENS, 20_000 - MOST_TOKENS)
    assert len(row["columns"]["loss"]) == MOST_TOKENS - 2
    assert report.stat().st_size < 5e6


def test_columns_that_the_report_does_not_know_are_shown_too(tmp_path):
    directory = make_run(tmp_path, steps=1)
    margin = pa.array([[0.5]], pa.list_(pa.float32()))
    texts = pa.array([["hint", ":"]], pa.list_(pa.string()))
    keep(
        directory,
        make_rows(1, [["a", "b", "c"]], teacher_margin=margin, teacher_prompt_texts=texts, sampler=["student"]),
    )
    [row] = data_of(write_report([directory.path]))[0]["tokens"]["rows"]
    assert row["columns"]["teacher_margin"] == [0.5]
    assert row["contexts"] == {"teacher_prompt": ["hint", ":"]}
    assert row["facts"]["sampler"] == "student"


def test_tokens_of_tools_and_the_version_that_wrote_each_token_are_told_apart(tmp_path):
    directory = make_run(tmp_path, steps=1)
    rows = make_rows(3, [["p", "p", "c", "o", "c"]], loss_mask=pa.array([[0, 0, 1, 0, 1]], pa.list_(pa.uint8())))
    for name in ("rollout_logprobs", "teacher_logprobs", "student_logprobs"):
        values = pa.array([[-0.5, -1.0]], pa.list_(pa.float32()))
        rows = rows.set_column(rows.column_names.index(name), name, values)
    keep(directory, rows)
    [row] = data_of(write_report([directory.path]))[0]["tokens"]["rows"]
    assert row["kinds"] == "ppcoc"
    assert row["columns"]["policy_version"] == [2, 3]
    assert row["columns"]["log_ratio"] == [0, 0]


def test_the_prompts_with_the_largest_log_ratio_come_first(tmp_path):
    directory = make_run(tmp_path, steps=2)
    for step, ratios in ((1, [0.5, 3.0]), (2, [2.0, -1.0])):
        rows = make_rows(step, [["p", "q", f"answer {step} {row}"] for row in range(2)])
        keep(
            directory,
            rows.set_column(rows.column_names.index("log_ratio"), "log_ratio", pa.array(ratios, pa.float32())),
        )
    text = text_of(write_report([directory.path]))
    places = [text.index(f"answer {answer}") for answer in ("1 1", "2 0", "1 0", "2 1")]
    assert places == sorted(places)


def test_answers_are_those_of_the_first_and_of_the_last_evaluation(tmp_path):
    directory = make_run(tmp_path, steps=1)
    for step, model, answer in (
        (0, "teacher main", "T"),
        (0, "student", "A"),
        (5, "student", "B"),
        (9, "student", "C"),
    ):
        sample = {"trajectory_id": 0, "prompt": "P?", "completion": f"answer {answer}", "reward": 1.0}
        write_samples(directory.samples, step, model, [sample])
    text = text_of(write_report([directory.path]))
    assert [answer in text for answer in ("answer T", "answer A", "answer B", "answer C")] == [True, True, False, True]


def test_ten_thousand_kept_rows_stay_small(tmp_path):
    directory = make_run(tmp_path, steps=50)
    rows = make_rows(1, [[f" word{place}" for place in range(50)]] * 200)
    place = rows.column_names.index("step")
    for step in range(1, 51):
        keep(directory, rows.set_column(place, "step", pa.array([step] * 200, pa.int32())))
    report = write_report([directory.path])
    [run] = data_of(report)
    assert report.stat().st_size < 5e6
    assert len({row["facts"]["step"] for row in run["tokens"]["rows"]}) > 10
    assert sum(run["distributions"][0]["shares"]["steps 1 to 17"]) == pytest.approx(1, abs=1e-3)


def test_runs_are_overlaid_and_those_of_one_name_are_numbered(tmp_path):
    directories = [make_run(tmp_path / str(place), steps=2) for place in range(2)]
    report = write_report([directory.path for directory in directories], tmp_path / "both.html")
    assert [run["name"] for run in data_of(report)] == ["run (1)", "run (2)"]
    assert data_of(report)[1]["curves"]["train/kl"][2] == [1.0, 0.5]


def test_too_many_runs_and_a_folder_without_a_run_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match="9 runs; one report compares up to 8"):
        write_report([tmp_path] * 9)
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report([tmp_path])


def test_the_report_asks_for_nothing_elsewhere_and_only_its_owner_reads_it(tmp_path):
    directory = make_run(tmp_path, steps=1)
    assert main(["report", str(directory.path)]) == 0
    report = directory.path / "report.html"
    text = text_of(report)
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert stat.S_IMODE(report.stat().st_mode) == 0o600


def test_long_curves_are_averaged(tmp_path):
    directory = make_run(tmp_path, steps=2500)
    steps, hours, values = data_of(write_report([directory.path]))[0]["curves"]["step/seconds"]
    assert (len(steps), steps[:2], values[0]) == (834, [3, 6], 1.0)
    assert hours[-1] == pytest.approx(2500 / 3600, abs=1e-4)


def test_settings_of_a_term_that_are_not_the_default_are_said():
    assert objective_in_words(make_config("objective=ppo-k1").objective) == [
        "preset ppo-k1",
        "policy gradient over the sampled token, student rollout, importance ppo_clip",
    ]


def test_an_objective_of_several_terms_is_a_sentence_each():
    terms = make_config(
        "objective=tail-topk", "objective.terms.main.weight=0.5", "objective.terms.main.when=trusted"
    ).objective
    assert objective_in_words(terms)[-1].startswith("0.5 x KL(student || target)")
    assert objective_in_words(terms)[-1].endswith(", where trusted")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"train/kl": 6.0}, "chat templates"),
        ({"train/sampler_learner_gap": 0.2}, "same dtype"),
        ({"rollout/truncated_ratio": 0.6}, "max_completion_tokens"),
        ({"train/student_candidate_mass": 0.5}, "support_size"),
        ({"train/gradient_norm": 50.0}, "max_gradient_norm"),
        ({"pool/rollout/idle_share": 0.6, "pool/learner/idle_share": 0.7}, "max_staleness = 1"),
        ({"pool/learner/restarts": 1.0}, "logs"),
    ],
)
def test_known_traps_are_found_in_the_steps(tmp_path, metrics, words):
    healthy, directory = (make_run(tmp_path, name=name, steps=0) for name in ("healthy", "trapped"))
    for step in range(1, 13):
        RecordsFile(healthy.metrics).write(make_record(step))
        RecordsFile(directory.metrics).write(make_record(step) | metrics)
    assert advise(read_run(healthy.path)) == []
    assert any(words in one.noticed + one.advice for one in advise(read_run(directory.path)))


def test_growing_completions_an_unmoved_kl_and_lost_entropy_are_found(tmp_path):
    directory = make_run(tmp_path)
    for step in range(1, 21):
        growing = {"rollout/completion_length": 10.0 * step, "rollout/truncated_ratio": step / 25, "train/kl": 1.0}
        RecordsFile(directory.metrics).write(make_record(step) | growing | {"train/entropy": 1 / step**2})
    noticed = " ".join(one.noticed for one in advise(read_run(directory.path)))
    for words in ("Completions grew from 30 to 180 tokens", "The KL did not fall", "entropy fell"):
        assert words in noticed
