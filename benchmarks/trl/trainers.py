"""TRL's two on-policy trainers without what only costs time; imported in TRL's environment alone.

Nothing of TRL's own arithmetic is replaced: each trainer is subclassed to report what it did.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.experimental.gkd.gkd_config import GKDConfig
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from benchmarks.trl.steps import Prompt, Settings, StepRecorder, step_prompts
from cluster.config.run_config import Config
from cluster.contracts.errors import PromptError
from cluster.models.model_files import context_length, load_tokenizer
from learner.train_step import learning_rate_at


class ReportedGKD(GKDTrainer):
    """GKDTrainer that reports every forward, and divides the loss by the tokens it trains on."""

    recorder: StepRecorder

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Drop the count, which is that of the data set's answers; the student's own completions replace those.

        Without a count TRL takes the mean over the completion tokens of each forward.
        """
        return super().training_step(model, inputs, None)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Tensor:
        """Return TRL's loss: the mean over this forward's completion tokens."""
        loss = super().compute_loss(model, inputs, *arguments, **options)  # type: ignore[no-untyped-call]
        lengths = (inputs["labels"] != -100).sum(dim=1)
        self.recorder.add(loss.item(), lengths.tolist(), int(inputs["prompt_attention_mask"].sum()))
        return loss


class ReportedDistillation(DistillationTrainer):
    """DistillationTrainer that reports every forward."""

    recorder: StepRecorder

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Tensor:
        """Return TRL's loss: this forward's part of the mean over all completion tokens of the step."""
        loss = super().compute_loss(model, inputs, *arguments, **options)
        lengths = inputs["completion_mask"].sum(dim=1)
        mean_loss = loss.item() * int(inputs["num_items_in_batch"]) / int(lengths.sum())
        self.recorder.add(mean_loss, lengths.tolist(), int(inputs["prompt_mask"].sum()))
        return loss


class StepClock(TrainerCallback):
    """Tells the recorder when training starts and when a step is over."""

    def __init__(self, recorder: StepRecorder) -> None:
        self._recorder = recorder

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the first step's clock."""
        self._recorder.start_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Write the step."""
        self._recorder.end_step()


def train(config: Config, settings: Settings, steps: int, recorder: StepRecorder) -> None:
    """Train the run file's student for some steps, as our own loop would begin its run."""
    (teacher,) = config.teachers.values()
    student = load_model(config.student.model, settings)
    tokenizer = load_tokenizer(config.student.model)
    tokenizer.padding_side = "left"
    prompts = step_prompts(config, steps, tokenizer, context_length(student.config))
    build = make_gkd if settings.trainer == "gkd" else make_distillation
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(
            config,
            prompts,
            common_arguments(config, settings, folder),
            model=student,
            teacher_model=load_model(teacher.model, settings),
            processing_class=tokenizer,
            callbacks=[StepClock(recorder)],
            optimizers=make_optimizer(student, config),
        )
        trainer.recorder = recorder
        trainer.train()


def make_gkd(config: Config, prompts: list[Prompt], arguments: dict[str, Any], **parts: Any) -> ReportedGKD:
    """Build GKDTrainer, fully on-policy; it wants answers, which it then drops, so each has one token."""
    answer = [parts["processing_class"].eos_token_id]
    rows = [
        {
            "prompt": prompt.text,
            "input_ids": prompt.token_ids + answer,
            "completion_mask": [0] * len(prompt.token_ids) + [1],
        }
        for prompt in prompts
    ]
    args = GKDConfig(
        **arguments,
        lmbda=1.0,
        beta=1.0,  # reverse KL
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_completion_tokens,
        max_length=None,
        train_sampling_strategy="sequential",
    )
    return ReportedGKD(args=args, train_dataset=Dataset.from_list(rows), **parts)


def make_distillation(
    config: Config, prompts: list[Prompt], arguments: dict[str, Any], **parts: Any
) -> ReportedDistillation:
    """Build DistillationTrainer, which tokenizes prompts itself.

    Raises:
        PromptError: it makes other tokens of them than our own loop.
    """
    chat = config.prompts.template == "chat"
    rows: list[Any] = [[{"role": "user", "content": prompt.text}] if chat else prompt.text for prompt in prompts]
    args = DistillationConfig(
        **arguments,
        beta=1.0,  # reverse KL
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_completion_length=config.rollout.max_completion_tokens,
        shuffle_dataset=False,
    )
    trainer = ReportedDistillation(args=args, train_dataset=Dataset.from_dict({"prompt": rows}), **parts)
    if trainer._tokenize_prompts(rows)[0] != [prompt.token_ids for prompt in prompts]:
        raise PromptError(f"{config.prompts.train}: TRL tokenizes the prompts differently from our own loop")
    return trainer


def common_arguments(config: Config, settings: Settings, folder: str) -> dict[str, Any]:
    """Return what both trainers are given; by default TRL checkpoints activations, logs, saves and computes in bf16."""
    count = config.prompts.prompts_per_step
    if count % settings.device_batch:
        raise SystemExit(f"--device-batch {settings.device_batch} does not divide the {count} prompts of a step")
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": settings.precision == "autocast",
        "gradient_checkpointing": False,  # with it, GKD would also generate without a KV cache
        "per_device_train_batch_size": settings.device_batch,
        "gradient_accumulation_steps": count // settings.device_batch,
        "num_train_epochs": 1,
        "max_grad_norm": config.learner.max_gradient_norm,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.run.seed,
    }


def load_model(model: str, settings: Settings) -> Any:
    """Load a model in the precision in which its weights are kept."""
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def make_optimizer(student: torch.nn.Module, config: Config) -> tuple[Any, Any]:
    """Return the run file's AdamW and schedule; fused, as TRL takes it by default."""
    learner = config.learner
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=learner.learning_rate,
        betas=learner.betas,
        eps=learner.epsilon,
        weight_decay=learner.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_at(step, config.run.steps, learner) / learner.learning_rate
    )
    return optimizer, schedule
