"""Faults of what stands before a first run: `preceptor init`, sizes of models, estimates of memory."""

from tests.faults.fault import Fault

_INIT = "tests/cluster/test_init.py::"
_MEMORY = "tests/cluster/placement/test_memory.py::"

FAULTS = (
    Fault(
        "memory_gradients_whole_under_stage_2",
        "cluster/placement/memory.py",
        "gradients=_gib(size.parameters * 4 / (ranks if stage >= 2 else 1))",
        "gradients=_gib(size.parameters * 4 / (ranks if stage > 2 else 1))",
        (f"{_MEMORY}test_stage_2_keeps_whole_weights_and_shards_the_rest",),
    ),
    Fault(
        "model_size_keys_without_values",
        "cluster/models/model_size.py",
        "return 2 * self.layers * self.kv_width",
        "return self.layers * self.kv_width",
        ("tests/cluster/models/test_model_size.py::test_the_embedded_student_is_counted_from_its_configuration",),
    ),
    Fault(
        "init_chooses_a_verifier_that_refuses_answers",
        "cluster/init.py",
        'check_answer("regex", answer)',
        "re.escape(answer)",
        (f"{_INIT}test_answers_choose_the_verifier",),
    ),
    Fault(
        "init_overwrites",
        "cluster/init.py",
        "if options.out.exists():",
        'if options.out.suffix == "":',
        (f"{_INIT}test_a_file_that_is_there_is_not_overwritten",),
    ),
    Fault(
        "init_accepts_an_end_of_turn_without_writing_so",
        "cluster/init.py",
        'draft.set(f"teachers.{TEACHER}.accept_differences", ["eos"], why)',
        'draft.set(f"teachers.{TEACHER}.accept_differences", [], why)',
        (f"{_INIT}test_turns_that_end_at_different_tokens_are_accepted_in_the_file",),
    ),
    Fault(
        "dry_run_asks_the_server",
        "cluster/simulation/dry_run.py",
        "inputs = load_inputs(_without_servers(config))",
        "inputs = load_inputs(config)",
        ("tests/cluster/simulation/test_dry_run.py::test_a_teachers_server_is_not_asked_and_takes_no_gpu",),
    ),
    Fault(
        "forward_check_allows_too_much",
        "learner/model/student.py",
        "{torch.float32: 1e-3, torch.bfloat16: 0.25}, 8.0",
        "{torch.float32: 1e-3, torch.bfloat16: 0.25}, 0.1",
        ("tests/learner/model/test_student.py::test_rounding_of_an_unlikely_token_is_no_fault_in_bfloat16",),
    ),
)
