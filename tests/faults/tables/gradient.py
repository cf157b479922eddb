"""Faults of the denominator, the optimizer and the gradient."""

from tests.faults.fault import Fault

FAULTS = (
    Fault(
        "gradient divided by all tokens",
        "learner/batching/arrivals.py",
        "        self.num_loss_tokens += num_tokens\n",
        "        self.num_loss_tokens += sum(handle.num_tokens)\n",
        ("tests/learner/batching/test_arrivals.py",),
    ),
    Fault(
        "loss divided per micro-batch",
        "learner/train_step.py",
        "engine.backward(result.loss, completes_step",
        "engine.backward(result.loss / max(1, len(batch.tokens)), completes_step",
        ("tests/learner/test_train_step.py::test_the_size_of_micro_batches_changes_nothing",),
    ),
    Fault(
        "gradient averaged over ranks",
        "learner/engines/zero.py",
        "self._engine.backward(loss * self.world_size)",
        "self._engine.backward(loss)",
        ("tests/learner/test_group.py::test_three_steps_give_the_losses_of_plain_torch[zero2]",),
    ),
    Fault(
        "every round completes the step",
        "learner/train_step.py",
        "completes_step and number == num_batches",
        "number == num_batches",
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
)
