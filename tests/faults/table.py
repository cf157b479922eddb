"""Lists small faults that an expert could make, and the tests of `make test` that catch each.

`python -m tests.faults` applies them one at a time. `before` stands once in the file; `test_table.py` holds that.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Describes one wrong change of the product.

    Example:
        >>> Fault("sum", "learner/sum.py", "a + b", "a - b", ("tests/learner/test_sum.py",)).applied_to("x = a + b")
        'x = a - b'
    """

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]  # files or ids, as few as catch it; none in tests/chaos, which `make test` leaves out

    def applied_to(self, text: str) -> str:
        return text.replace(self.before, self.after)


FAULTS = (
    # Alignment.
    Fault(
        "predicting position off by one",
        "learner/batching/micro_batch.py",
        "np.flatnonzero(rows[index].loss_mask) - 1)",
        "np.flatnonzero(rows[index].loss_mask))",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "predicting positions count from the grid row",
        "learner/batching/micro_batch.py",
        "row * row_length + start + np.flatnonzero",
        "row * row_length + np.flatnonzero",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "position ids go on through a packed row",
        "learner/batching/micro_batch.py",
        "start : start + length] = np.arange(length)",
        "start : start + length] = np.arange(start, start + length)",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "last tokens taken for the sampled ones",
        "learner/batching/micro_batch.py",
        "row.token_ids[row.loss_mask != 0] for row",
        "row.token_ids[-len(row.rollout_logprobs) :] for row",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "places of a route count from its own tokens",
        "learner/batching/micro_batch.py",
        "np.arange(end - len(row.rollout_logprobs), end)",
        "np.arange(len(row.rollout_logprobs))",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "student log-probabilities in packed order",
        "learner/worker.py",
        "*(of_rows[index] for index in range(len(lengths)))",
        "*of_rows.values()",
        ("tests/learner/test_worker.py",),
    ),
    Fault(
        "teacher scores shifted by one",
        "teacher_workers/backends/lm_head_scores.py",
        "np.flatnonzero(loss_mask) - 1 - num_cached",
        "np.flatnonzero(loss_mask) - num_cached",
        ("tests/teacher_workers/backends/test_lm_head_scores.py",),
    ),
    Fault(
        "scores of given candidates shifted by one",
        "teacher_workers/backends/lm_head_scores.py",
        'scores["candidate_logprobs"] = logprobs[:, 1:]',
        'scores["candidate_logprobs"] = logprobs[:, :-1]',
        ("tests/teacher_workers/backends/test_lm_head_scores.py",),
    ),
    Fault(
        "candidates of a rollout shifted by one",
        "rollout_workers/vllm_requests.py",
        "candidate_logprobs=logprobs[:, 1:] if num_listed",
        "candidate_logprobs=logprobs[:, :-1] if num_listed",
        ("tests/rollout_workers/test_vllm_requests.py",),
    ),
    Fault(
        "a slice is read from its parent's first row",
        "cluster/contracts/columns.py",
        "column.values.slice(offsets[0], offsets[-1] - offsets[0])",
        "column.values.slice(0, offsets[-1] - offsets[0])",
        ("tests/cluster/contracts/test_trajectory.py",),
    ),
    Fault(
        "a batch's rows counted as one",
        "learner/batching/arrivals.py",
        "            count += len(self._handles[batch].trajectory_ids)\n",
        "            count += 1\n",
        ("tests/learner/batching/test_arrivals.py",),
    ),
    # Mask.
    Fault(
        "observations trained on",
        "rollout_workers/trajectory_builder.py",
        "[isinstance(segment, Completion) for segment in segments]",
        "[index > 0 for index, _ in enumerate(segments)]",
        ("tests/rollout_workers/test_trajectory_builder.py", "tests/rollout_workers/test_rollout_worker.py"),
    ),
    Fault(
        "first tokens left out instead of kept",
        "learner/loss/token_weights.py",
        "early &= position < tokens",
        "early &= position >= tokens",
        ("tests/learner/loss/test_token_weights.py",),
    ),
    Fault(
        "token weights left out of a term",
        "learner/loss/terms.py",
        "weights = config.weight * plan.weights\n",
        "weights = config.weight * torch.ones_like(plan.weights)\n",
        ("tests/learner/loss/test_terms.py",),
    ),
    # Denominator and gradient.
    Fault(
        "gradient divided by all tokens",
        "learner/batching/arrivals.py",
        "self.num_completion_tokens += sum(handle.num_completion_tokens)",
        "self.num_completion_tokens += sum(handle.num_tokens)",
        ("tests/learner/batching/test_arrivals.py",),
    ),
    Fault(
        "loss divided per micro-batch",
        "learner/train_step.py",
        "engine.backward(result.loss, is_last",
        "engine.backward(result.loss / max(1, len(batch.tokens)), is_last",
        ("tests/learner/test_train_step.py::test_the_size_of_micro_batches_changes_nothing",),
    ),
    Fault(
        "gradient averaged over ranks",
        "learner/engines/zero.py",
        "self._engine.backward(loss * self.world_size)",
        "self._engine.backward(loss)",
        ("tests/learner/test_group.py::test_three_steps_give_the_weights_of_plain_torch[zero2]",),
    ),
    Fault(
        "every round completes the step",
        "learner/train_step.py",
        "is_last and completes_step",
        "is_last",
        (
            "tests/learner/test_train_step.py::test_micro_batches_may_come_one_by_one_and_the_last_of_the_step_is_marked",
        ),
    ),
    Fault(
        "gradients of a bfloat16 weight added twice",
        "learner/engines/torch.py",
        "        computed.grad = None\n",
        "",
        ("tests/learner/test_train_step.py::test_a_restored_bfloat16_engine_goes_on_as_if_it_had_not_stopped",),
    ),
    Fault(
        "no gradient clipping under ZeRO",
        "learner/engines/zero.py",
        '"gradient_clipping": config.max_gradient_norm',
        '"gradient_clipping": 0.0',
        ("tests/learner/test_group.py::test_three_steps_give_the_weights_of_plain_torch[zero2]",),
    ),
    Fault(
        "betas exchanged",
        "learner/engines/base.py",
        '"betas": config.betas',
        '"betas": config.betas[::-1]',
        ("tests/learner/test_train_step.py::test_the_moments_of_the_optimizer_decay_as_the_run_file_says",),
    ),
    Fault(
        "warm-up a step late",
        "learner/train_step.py",
        "config.learning_rate * (step + 1) / config.warmup_steps",
        "config.learning_rate * step / config.warmup_steps",
        ("tests/learner/test_lr_schedule.py",),
    ),
    Fault(
        "learning rate of the next step",
        "learner/group.py",
        'self._ask("take_step", num_tokens, step,',
        'self._ask("take_step", num_tokens, step + 1,',
        ("tests/learner/batching/test_arriving_batches.py::test_only_the_last_round_completes_the_step",),
    ),
    Fault(
        "gradient of the head's weight summed in bfloat16",
        "learner/model/projection.py",
        "torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32), of_bias",
        "torch.zeros_like(hidden), torch.zeros_like(weight), of_bias",
        ("tests/learner/model/test_projection.py",),
    ),
    # Objective.
    Fault(
        "advantage of the wrong sign",
        "learner/loss/policy_gradient.py",
        '"identity": lambda q, p, _: q - p,',
        '"identity": lambda q, p, _: p - q,',
        ("tests/learner/loss/test_policy_gradient.py",),
    ),
    Fault(
        "importance ratio upside down",
        "learner/loss/policy_gradient.py",
        "return (student - rollout).clamp(",
        "return (rollout - student).clamp(",
        ("tests/learner/loss/test_importance.py",),
    ),
    Fault(
        "importance ratio truncated from below",
        "learner/loss/policy_gradient.py",
        ".detach().clamp(max=bounds.high)",
        ".detach().clamp(min=bounds.low)",
        ("tests/learner/loss/test_importance.py",),
    ),
    Fault(
        "log-ratio to the rollout instead of the student",
        "learner/loss/terms.py",
        '{"current": student, "rollout": rollout,',
        '{"current": rollout, "rollout": student,',
        ("tests/conformance/test_estimator_identities.py",),
    ),
    Fault(
        "forward and reverse KL exchanged at the ends of JSD",
        "learner/loss/divergences.py",
        'ends={0.0: "forward_kl", 1.0: "reverse_kl"}',
        'ends={1.0: "forward_kl", 0.0: "reverse_kl"}',
        ("tests/learner/loss/test_divergences.py",),
    ),
    Fault(
        "beta weighs the student in the exact JSD",
        "learner/loss/divergences.py",
        "out=spare[0]).mul_(beta)\n    log_mixture = torch.add(ratio, 1 - beta,",
        "out=spare[0]).mul_(1 - beta)\n    log_mixture = torch.add(ratio, beta,",
        ("tests/learner/loss/test_exact.py",),
    ),
    Fault(
        "skewed reverse KL mixes the wrong share",
        "learner/loss/divergences.py",
        "lambda d, skew: -_log_mixture(d, 1 - skew)",
        "lambda d, skew: -_log_mixture(d, skew)",
        ("tests/learner/loss/test_divergences.py",),
    ),
    Fault(
        "tail mass dropped",
        "learner/loss/divergences.py",
        'return with_tail(kept) if truncation == "tail" else kept',
        "return kept",
        ("tests/learner/loss/test_divergences.py",),
    ),
    Fault(
        "logits read in bfloat16",
        "learner/loss/softmax.py",
        "return values if values.dtype in (torch.float32, torch.float64) else values.float()",
        "return values",
        ("tests/learner/loss/test_softmax.py",),
    ),
    Fault(
        "discount of one token at every distance",
        "learner/loss/token_weights.py",
        "* discount**width",
        "* discount",
        ("tests/learner/loss/test_token_weights.py",),
    ),
    Fault(
        "samples of a prompt taken apart",
        "learner/batching/arrivals.py",
        "key = trajectory_id // self.samples_per_prompt",
        "key = trajectory_id % self.samples_per_prompt",
        ("tests/learner/batching/test_arrivals.py",),
    ),
    Fault(
        "heads of the first route for all",
        "learner/model/completion_head.py",
        "teacher_heads[chunk.route][model].logits(hidden)",
        "teacher_heads[batch.routes[0].route][model].logits(hidden)",
        (
            "tests/learner/model/test_completion_head.py::test_tokens_of_two_routes_meet_the_heads_of_their_own_teachers",
        ),
    ),
    Fault(
        "short trajectories padded to the longest",
        "learner/model/attention.py",
        "members = [np.flatnonzero(doublings == doubling) for doubling in np.unique(doublings)]",
        "members = [np.arange(len(lengths))]",
        ("tests/learner/model/test_attention.py",),
    ),
    Fault(
        "packed trajectories see each other",
        "learner/model/student.py",
        "Segments.of(batch.lengths, ids.device)",
        "Segments.of((sum(batch.lengths),), ids.device)",
        ("tests/learner/model/test_attention.py",),
    ),
    Fault(
        "padded tokens brought back",
        "learner/model/attention.py",
        "np.flatnonzero(steps < lengths[:, None])",
        "np.flatnonzero(steps <= lengths[:, None])",
        ("tests/learner/model/test_attention.py",),
    ),
    Fault(
        "KL metric against the rollout",
        "learner/train_step.py",
        '"kl": _mean(result.logprobs - tokens.logprobs[TEACHER])',
        '"kl": _mean(tokens.rollout_logprobs - tokens.logprobs[TEACHER])',
        ("tests/learner/test_train_step.py::test_figures_are_means_over_completion_tokens",),
    ),
    # Weight sync.
    Fault(
        "last bucket lost",
        "cluster/weight_sync/manifest.py",
        "    if bucket:\n        yield tuple(bucket)\n",
        "",
        ("tests/cluster/weight_sync/test_manifest.py",),
    ),
    Fault(
        "tied head left as it was",
        "rollout_workers/weight_sync/object_store.py",
        "self._tied_layers = tied_layers(self.model)",
        "self._tied_layers: list[Any] = []",
        (
            "tests/rollout_workers/test_rollouts_on_vllm.py::test_new_weights_reach_running_requests_and_leave_no_stale_prefix",
        ),
    ),
    Fault(
        "prefix of old weights kept",
        "rollout_workers/vllm_engine.py",
        'pause_scheduler_async(mode="keep", clear_cache=True)',
        'pause_scheduler_async(mode="keep", clear_cache=False)',
        (
            "tests/rollout_workers/test_rollouts_on_vllm.py::test_new_weights_reach_running_requests_and_leave_no_stale_prefix",
        ),
    ),
    Fault(
        "changes kept from values that were sent whole",
        "cluster/weight_sync/delta.py",
        "            kept[:] = new\n        if not has_base",
        "                kept[:] = new\n        if not has_base",
        ("tests/cluster/weight_sync/test_delta.py",),
    ),
    Fault(
        "changes applied to another base",
        "rollout_workers/weight_sync/object_store.py",
        "message.base_version != self._kept_version:",
        "self._kept_version is None:",
        (
            "tests/rollout_workers/test_rollouts_on_vllm.py::test_changes_to_a_version_that_a_worker_does_not_hold_are_refused",
        ),
    ),
    Fault(
        "checksum of a worker not compared",
        "learner/weight_sync/object_store.py",
        "        if digest != sent:\n",
        "        if not digest:\n",
        ("tests/learner/weight_sync/test_object_store.py",),
    ),
    Fault(
        "same policy version taken twice",
        "rollout_workers/worker.py",
        "policy_version <= self._policy_version:",
        "policy_version < self._policy_version:",
        ("tests/rollout_workers/test_rollout_worker.py",),
    ),
    Fault(
        "restarted worker labelled with the first version",
        "learner/group.py",
        "        self._published_version = policy_version\n",
        "",
        (
            "tests/learner/batching/test_arriving_batches.py::test_a_worker_that_comes_late_gets_the_version_that_the_others_have",
        ),
    ),
    Fault(
        "next version begins a token late",
        "rollout_workers/trajectory_builder.py",
        "np.searchsorted(by_token, later)",
        'np.searchsorted(by_token, later, side="right")',
        ("tests/rollout_workers/test_trajectory_builder.py",),
    ),
    # Rollouts.
    Fault(
        "one seed for all samples of a prompt",
        "cluster/run/inputs.py",
        "sampling_seed(*seed, prompt_id, sample))",
        "sampling_seed(*seed, prompt_id))",
        ("tests/cluster/run/test_inputs.py",),
    ),
    Fault(
        "every step asks the first prompts",
        "cluster/run/inputs.py",
        "inputs.train.take(first, count)",
        "inputs.train.take(0, count)",
        ("tests/cluster/run/test_inputs.py",),
    ),
    Fault(
        "every step has the seeds of the first",
        "cluster/run/inputs.py",
        "(config.run.seed, _TRAIN, step)",
        "(config.run.seed, _TRAIN, 0)",
        ("tests/cluster/run/test_inputs.py",),
    ),
    Fault(
        "held-out prompts trained on",
        "cluster/run/inputs.py",
        "train=PromptOrder(len(train),",
        "train=PromptOrder(len(prompts),",
        ("tests/cluster/run/test_inputs.py",),
    ),
    Fault(
        "training samples at temperature 1",
        "cluster/run/inputs.py",
        "        rollout.temperature,\n",
        "        1.0,\n",
        ("tests/cluster/run/test_inputs.py",),
    ),
    Fault(
        "order of prompts starts anew after an epoch",
        "rollout_workers/prompts.py",
        "default_rng([self.seed, epoch])",
        "default_rng([self.seed])",
        ("tests/rollout_workers/test_prompts.py",),
    ),
    Fault(
        "temperature applied twice to candidates",
        "rollout_workers/candidates/vllm_processor.py",
        "rows.append(LogitsRow(candidates, index, position, temperature))",
        "rows.append(LogitsRow(candidates, index, position, temperature**2))",
        ("tests/rollout_workers/candidates/test_vllm_processor.py",),
    ),
    Fault(
        "temperature not in the rollout's log-probabilities",
        "rollout_workers/vllm_engine.py",
        'logprobs_mode="processed_logprobs"',
        'logprobs_mode="raw_logprobs"',
        (
            "tests/rollout_workers/test_rollouts_on_vllm.py::test_logprobs_are_those_of_the_distribution_that_was_sampled",
        ),
    ),
    Fault(
        "every turn has the seed of the first",
        "rollout_workers/worker.py",
        "turn_seed(request.seed, turn=len(segments) // 2)",
        "turn_seed(request.seed, turn=0)",
        ("tests/rollout_workers/test_rollout_worker.py",),
    ),
    Fault(
        "cut trajectory labelled as finished",
        "rollout_workers/worker.py",
        'reason: FinishReason = "abort" if completion.finish_reason == "abort" else "length"',
        "reason: FinishReason = completion.finish_reason",
        ("tests/rollout_workers/test_rollout_worker.py",),
    ),
    Fault(
        "rows of two teachers in one batch",
        "rollout_workers/batching.py",
        "rows = self._pending.setdefault(teacher, [])",
        'rows = self._pending.setdefault("", [])',
        ("tests/rollout_workers/test_batching.py",),
    ),
    Fault(
        "trajectories of a dead worker sampled twice",
        "rollout_workers/pool.py",
        'self._send("next_batch", replace(awaited, requests=left))',
        'self._send("next_batch", awaited)',
        ("tests/rollout_workers/test_failover.py::test_every_completion_is_written_once_though_a_worker_dies",),
    ),
    Fault(
        "restarted worker without the current weights",
        "rollout_workers/pool.py",
        "return prompts + ([self._bring_weights(actor)] if self._bring_weights else [])",
        "return prompts",
        (
            "tests/rollout_workers/test_failover.py::test_a_worker_that_came_back_writes_with_the_weights_it_was_brought",
        ),
    ),
    Fault(
        "rollouts under way survive a rewind",
        "cluster/run/supervisor.py",
        "            self._pipeline.rollouts.abandon()\n",
        "",
        ("tests/cluster/run/test_supervisor.py",),
    ),
    Fault(
        "EOS left out",
        "rollout_workers/vllm_requests.py",
        "token_ids=np.asarray(output.token_ids, np.int32),\n        logprobs=logprobs[:, 0],",
        "token_ids=np.asarray(output.token_ids, np.int32)[:-1],\n        logprobs=logprobs[:-1, 0],",
        ("tests/rollout_workers/test_vllm_requests.py",),
    ),
    Fault(
        "absent part of a packed parameter not noticed",
        "rollout_workers/weight_sync/object_store.py",
        "if not received_names.isdisjoint(parts):",
        "if received_names.isdisjoint(parts):",
        (
            "tests/rollout_workers/weight_sync/test_object_store.py::test_one_absent_part_of_a_packed_parameter_is_missing",
        ),
    ),
    Fault(
        "trajectory ids in 32 bits",
        "cluster/contracts/trajectory.py",
        'pa.field("trajectory_id", pa.int64(), nullable=False)',
        'pa.field("trajectory_id", pa.int32(), nullable=False)',
        ("tests/cluster/contracts/test_trajectory.py",),
    ),
    Fault(
        "log-probabilities in half precision",
        "cluster/contracts/trajectory.py",
        'pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False)',
        'pa.field("rollout_logprobs", pa.list_(pa.float16()), nullable=False)',
        ("tests/cluster/contracts/test_trajectory.py",),
    ),
    # Teachers.
    Fault(
        "prompt without a teacher goes to the first",
        "rollout_workers/prompts.py",
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
        "teacher_workers/backends/lm_head_scores.py",
        ".where(is_known, FLOOR)",
        ".where(is_known, 0.0)",
        ("tests/teacher_workers/backends/test_lm_head_scores.py",),
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
        "teacher_workers/backends/lm_head_scores.py",
        "return (requested - normalizer).where(is_known, FLOOR), best_ids,",
        "return (requested - normalizer).where(is_known, FLOOR), best_ids.flip(-1),",
        ("tests/teacher_workers/backends/test_lm_head_scores.py",),
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
        'ragged(scored, "rollout_logprobs").values - logprobs',
        'logprobs - ragged(scored, "rollout_logprobs").values',
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
    # The run.
    Fault(
        "one step more in flight than allowed",
        "cluster/run/driver.py",
        "min(step + self.max_staleness + 1, self.num_steps)",
        "min(step + self.max_staleness + 2, self.num_steps)",
        ("tests/cluster/run/test_permits.py",),
    ),
    Fault(
        "batches given out twice",
        "cluster/run/flow.py",
        "given = self.finished[self._num_given :]",
        "given = self.finished[:]",
        ("tests/cluster/simulation/test_simulated_run.py",),
    ),
    Fault(
        "repeated row not noticed",
        "cluster/run/ledger.py",
        "            if trajectory_id not in self._missing:\n"
        '                self._fail(f"trajectory {trajectory_id} came a second time")\n'
        "            expected = self._missing.pop(trajectory_id)\n",
        "            expected = self._missing.pop(trajectory_id, prompt_id)\n",
        ("tests/cluster/run/test_ledger.py",),
    ),
    Fault(
        "lost row not noticed",
        "cluster/run/ledger.py",
        "            return False\n        self._check_complete()\n        return True\n",
        "            return False\n        return True\n",
        ("tests/cluster/run/test_ledger.py",),
    ),
    Fault(
        "staleness bound of the audit too wide",
        "cluster/run/ledger.py",
        "if not index - config.rollout.max_staleness <= lowest",
        "if not index - config.rollout.max_staleness - 1 <= lowest",
        ("tests/cluster/run/test_ledger.py",),
    ),
    Fault(
        "staleness counted from the next step",
        "cluster/run/step_metrics.py",
        "ages = [step - 1 - version for",
        "ages = [step - version for",
        ("tests/cluster/run/test_step_metrics.py",),
    ),
    Fault(
        "means of parts averaged",
        "cluster/contracts/metrics.py",
        "return type(self)(self.total + other.total, self.weight + other.weight)",
        "return type(self)(self.value + other.value, 2.0)",
        ("tests/cluster/contracts/test_metrics.py",),
    ),
    Fault(
        "oldest checkpoint resumed",
        "cluster/run/checkpoints.py",
        "for folder in reversed(checkpoints(directory.checkpoints)):",
        "for folder in checkpoints(directory.checkpoints):",
        ("tests/cluster/run/test_damaged_checkpoints.py",),
    ),
    Fault(
        "checksum of a checkpoint not compared",
        "learner/checkpointing/manifest.py",
        "        if entry_of(path) != entry:\n",
        "        if entry_of(path).num_bytes != entry.num_bytes:\n",
        ("tests/cluster/run/test_damaged_checkpoints.py",),
    ),
    Fault(
        "newest checkpoints pruned",
        "learner/checkpointing/checkpoint.py",
        "for folder in complete[:-keep_last]:",
        "for folder in complete[keep_last:]:",
        ("tests/learner/checkpointing/test_checkpoint.py",),
    ),
    Fault(
        "checkpoint shares memory with training",
        "learner/checkpointing/shards.py",
        'tensor.detach().to("cpu", copy=True).contiguous()',
        'tensor.detach().to("cpu").contiguous()',
        ("tests/learner/checkpointing/test_shards.py",),
    ),
    Fault(
        "checkpoint without optimizer state",
        "learner/engines/torch.py",
        'flatten(self._masters, self._optimizer.state_dict()["state"])',
        "flatten(self._masters, {})",
        ("tests/learner/test_train_step.py::test_a_restored_bfloat16_engine_goes_on_as_if_it_had_not_stopped",),
    ),
    Fault(
        "every rank loads the first one's shard",
        "learner/worker.py",
        "read_shard(folder / shard_name(self._engine.rank))",
        "read_shard(folder / shard_name(0))",
        ("tests/learner/test_worker.py",),
    ),
    Fault(
        "random state not restored",
        "learner/worker.py",
        "        set_random_state(generators)\n",
        "",
        ("tests/learner/test_worker.py",),
    ),
    Fault(
        "record of the last step forgotten at a resume",
        "cluster/run/ledger.py",
        "self._file.drop_from(first_step + 1)",
        "self._file.drop_from(first_step)",
        ("tests/cluster/run/test_ledger.py",),
    ),
    Fault(
        "unknown fields ignored",
        "cluster/config/fields.py",
        "forbid_unknown_fields=True",
        "forbid_unknown_fields=False",
        ("tests/cluster/config/test_run_config.py",),
    ),
    Fault(
        "former name of a field read and dropped",
        "cluster/config/run_file.py",
        "            tree[new_section][new_field] = fields.pop(field)\n",
        "            fields.pop(field)\n",
        (
            "tests/cluster/weight_sync/test_transports.py::test_the_former_names_of_fields_still_work_with_one_warning_each",
        ),
    ),
    Fault(
        "lower length cap in steps under way",
        "cluster/monitoring/alarms.py",
        "self._changes.append((after_step + self.max_staleness, lowered))",
        "self._changes.append((after_step, lowered))",
        ("tests/cluster/monitoring/test_alarms.py",),
    ),
    Fault(
        "one restart more than allowed",
        "cluster/actors/replicas.py",
        "if len(spent) >= self._limit.max_restarts:",
        "if len(spent) > self._limit.max_restarts:",
        ("tests/test_docstring_examples.py",),
    ),
)
