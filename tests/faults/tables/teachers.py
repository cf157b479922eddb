"""Faults of the teachers."""

from tests.faults.fault import Fault

FAULTS = (
    Fault(
        "prompt without a teacher goes to the first",
        "rollout_workers/load_prompts.py",
        "if teacher is None and len(names) == 1:",
        "if teacher is None:",
        ("tests/rollout_workers/test_prompts.py",),
    ),
    Fault(
        "base of every route is the routed teacher",
        "cluster/config/run_config.py",
        "return (self.teachers[route].base or route) if model == BASE else model",
        "return route if model == BASE else model",
        ("tests/cluster/config/test_objective.py",),
    ),
    Fault(
        "unknown token scored 0",
        "cluster/models/token_scores.py",
        ".where(is_known, FLOOR)",
        ".where(is_known, 0.0)",
        ("tests/cluster/models/test_token_scores.py",),
    ),
    Fault(
        "NaN scores filled with zeros",
        "teacher_workers/actor.py",
        "            if scores.keys() != request.signals:",
        "            scores = {name: np.nan_to_num(values) for name, values in scores.items()}\n"
        "            if scores.keys() != request.signals:",
        ("tests/teacher_workers/test_teacher_worker.py",),
    ),
    Fault(
        "candidate ids worst first",
        "cluster/models/token_scores.py",
        "columns += [best_ids.view(torch.float32), best]",
        "columns += [best_ids.flip(-1).contiguous().view(torch.float32), best]",
        ("tests/cluster/models/test_token_scores.py",),
    ),
    Fault(
        "scored batch of step 0",
        "teacher_workers/pool.py",
        "            rollout=sent.rollout,\n",
        "",
        ("tests/cluster/simulation/test_simulated_run.py",),
    ),
    Fault(
        "step scored by two checkpoints",
        "teacher_workers/replacement.py",
        "0 <= step < retired.until_step",
        "0 <= step <= retired.until_step",
        (
            "tests/teacher_workers/test_replacement.py::test_a_step_is_scored_by_the_checkpoint_that_it_was_asked_for_under",
        ),
    ),
    Fault(
        "sampled KL of the wrong sign",
        "teacher_workers/actor.py",
        "gap, num_scored = rollout_logprobs - logprobs,",
        "gap, num_scored = logprobs - rollout_logprobs,",
        ("tests/teacher_workers/test_teacher_worker.py",),
    ),
    Fault(
        "soft cap before the factor",
        "cluster/models/lm_head.py",
        "factor *= float(value) ** power",
        "factor *= float(value)",
        ("tests/cluster/models/test_lm_head.py",),
    ),
    Fault(
        "head tied by the inner configuration alone",
        "cluster/models/lm_head.py",
        "return bool(inner if outer is None else outer)",
        "return bool(inner)",
        ("tests/cluster/models/test_lm_head.py",),
    ),
    Fault(
        "replacement takes over before it serves",
        "cluster/elastic/replace_teacher.py",
        "if replacement.error is None and (replacement.replicas.serving or replacement.waits_for_place):",
        "if replacement.error is None:",
        ("tests/cluster/elastic/test_replace_teacher.py",),
    ),
    Fault(
        "teacher needed from the wrong prompt on",
        "cluster/elastic/scale.py",
        "inputs.train.take(next_step * per_step,",
        "inputs.train.take(next_step,",
        ("tests/cluster/elastic/test_teacher_needs.py",),
    ),
    # Servers behind URLs.
    Fault(
        "a server's positions begin one too early",
        "teacher_workers/backends/http.py",
        "positions[place - 1]",
        "positions[place - 2]",
        ("tests/teacher_workers/backends/test_http.py",),
    ),
    Fault(
        "a server's answer may be shorter than the row",
        "teacher_workers/completions_client.py",
        "len(positions) != len(ids)",
        "len(positions) > len(ids)",
        ("tests/teacher_workers/backends/test_http.py",),
    ),
    Fault(
        "a server's busy answer ends the run",
        "teacher_workers/completions_client.py",
        "{408, 425, 429, 500,",
        "{408, 425, 500,",
        ("tests/teacher_workers/backends/test_http.py",),
    ),
    Fault(
        "the key stands in the sentence",
        "teacher_workers/completions_client.py",
        'text.replace(self._key, "***")',
        'text.replace("***", self._key)',
        ("tests/teacher_workers/backends/test_http_before_a_run.py",),
    ),
    Fault(
        "a teacher behind a URL keeps its GPUs",
        "cluster/config/stages.py",
        '\n        force_setattr(self, "engine", replace(self.engine, tensor_parallel=0))',
        "",
        ("tests/cluster/placement/test_placement.py",),
    ),
)
