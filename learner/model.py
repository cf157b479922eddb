"""The student as the learner runs it: packed grids in, log-probabilities of completion tokens out.

The LM head runs over completion positions only, in chunks whose logits are computed again in the backward pass, so at
most one chunk of [chunk, vocabulary] logits lives at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.contracts.config import LearnerConfig, StudentConfig
from cluster.contracts.errors import ModelError
from cluster.contracts.weights import TensorSpec, WeightManifest
from cluster.model_files import load_model_config, looks_local
from learner.micro_batch import MicroBatch, Trajectory, build_micro_batch

HEAD_CHUNK_LOGITS = 1 << 25  # fp32 logits alive at once: 128 MiB
PROBE_LENGTHS = (5, 3)  # tokens of the two sequences that check the forward when a model is loaded
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}  # of a log-probability


@dataclass(frozen=True)
class StudentScores:
    """What the current student says of the completion tokens of one micro-batch; float32."""

    logprobs: Tensor  # [completion_tokens] of the sampled tokens
    topk_logprobs: Tensor  # [completion_tokens, k] of the teacher's most likely tokens
    entropy: Tensor  # [completion_tokens] over the whole vocabulary, without gradient


def load_student(student: StudentConfig, config: LearnerConfig) -> "Student":
    """Read the model that learns.

    Raises:
        ModelError: it is missing or unreadable, or its forward is not one that the learner computes faithfully.
    """
    model_config = load_model_config(student.model, student.trust_remote_code)
    _disable_dropout(model_config)
    try:
        causal_lm = AutoModelForCausalLM.from_pretrained(
            student.model,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation="sdpa",
            trust_remote_code=student.trust_remote_code,
            local_files_only=looks_local(student.model) and Path(student.model).is_dir(),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"student '{student.model}': cannot load its weights: {reason}") from error
    model = Student(causal_lm)
    check_forward(model, student.model)
    if config.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


class Student(nn.Module):
    """Wraps a causal LM; parameters keep their Hugging Face names under `causal_lm`."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.head = CompletionHead(causal_lm)
        # ZeRO-3 leaves empty tensors in place of the parameters, so their shapes are noted before.
        self._shapes = {name: tuple(parameter.shape) for name, parameter in causal_lm.named_parameters()}

    def manifest(self, dtype: str) -> WeightManifest:
        """Describe every parameter as it travels in the given dtype; tied parameters appear once."""
        return WeightManifest(tuple(TensorSpec(name, shape, dtype) for name, shape in self._shapes.items()))

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return StudentScores as a plain tuple, which DeepSpeed's hooks can look into."""
        decoded = self.causal_lm.get_decoder()(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        )
        hidden = decoded.last_hidden_state.flatten(0, 1).index_select(0, batch.predicting)
        scores: tuple[Tensor, Tensor, Tensor] = self.head(hidden, batch.target_ids, batch.teacher_topk_ids)
        return scores


class CompletionHead(nn.Module):
    """The LM head, softmax and gather over completion positions, chunk by chunk.

    It holds the head's own parameters a second time, as its direct members: ZeRO-3 gathers a parameter around the
    forward and backward of the module that owns it, once per micro-batch on every rank however many chunks there are.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        linear = causal_lm.get_output_embeddings()
        config = causal_lm.config.get_text_config().to_dict()
        self.weight = linear.weight
        self.bias = linear.bias
        self.chunk_tokens = max(1, HEAD_CHUNK_LOGITS // linear.weight.shape[0])
        self.softcap: float | None = config.get("final_logit_softcapping")  # Gemma
        # Cohere multiplies its logits, Granite divides them; `check_forward` finds models that do anything else.
        self.logit_factor = config.get("logit_scale") or 1.0 / config.get("logits_scaling", 1.0)

    def forward(self, hidden: Tensor, target_ids: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [tokens, hidden] to logprobs [tokens], top-k logprobs [tokens, k] and entropy [tokens]."""
        ids = torch.cat([target_ids.unsqueeze(-1), topk_ids], dim=-1)
        chunks = [
            checkpoint(self._score, chunk, chunk_ids, use_reentrant=False)
            for chunk, chunk_ids in zip(*(torch.split(part, self.chunk_tokens) for part in (hidden, ids)), strict=True)
        ]
        logprobs = torch.cat([chunk for chunk, _ in chunks])
        return logprobs[:, 0], logprobs[:, 1:], torch.cat([entropy for _, entropy in chunks])

    def _score(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional.linear(hidden, self.weight, self.bias).float() * self.logit_factor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        with torch.no_grad():
            probabilities = (logits - normalizer).exp()
            entropy = normalizer.squeeze(-1) - torch.nan_to_num(probabilities * logits, nan=0.0).sum(-1)
        return logits.gather(-1, ids) - normalizer, entropy


def check_forward(student: Student, name: str) -> None:
    """Compare log-probabilities of two packed sequences with those of the model's own forward on each alone.

    Raises:
        ModelError: they differ: packed sequences see each other, or the model treats its logits in an unknown way.
    """
    vocabulary = student.head.weight.shape[0]
    rows = [_probe_row(length, vocabulary) for length in PROBE_LENGTHS]
    with torch.no_grad(), _in_eval_mode(student):
        packed = student(build_micro_batch(((0, 1),), rows, top_k=0))[0]
        alone = torch.cat([_logprobs_alone(student.causal_lm, torch.from_numpy(row.token_ids)) for row in rows])
    difference = (packed - alone).abs().max().item()
    if not difference <= PROBE_TOLERANCE[student.head.weight.dtype]:
        raise ModelError(
            f"student '{name}': log-probabilities of two packed sequences differ by {difference:.2g} from those of its "
            "own forward on each alone; the learner supports decoder-only attention models whose logits are scaled by "
            "logit_scale, logits_scaling or final_logit_softcapping"
        )


def _logprobs_alone(causal_lm: PreTrainedModel, token_ids: Tensor) -> Tensor:
    logits = causal_lm(input_ids=token_ids.unsqueeze(0), use_cache=False).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(-1, token_ids[1:].unsqueeze(-1)).squeeze(-1)


def _probe_row(length: int, vocabulary: int) -> Trajectory:
    token_ids = ((1 + torch.arange(length) * 7) % vocabulary).numpy()
    loss_mask = (torch.arange(length) > 0).numpy()
    nothing = torch.zeros(length - 1).numpy()
    return Trajectory(token_ids, loss_mask, nothing, nothing, nothing[:, None][:, :0], nothing[:, None][:, :0])


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    yield
    module.train(was_training)


def _disable_dropout(model_config: Any) -> None:
    """Set every dropout rate to 0: the student must give its samples the probability that the rollout worker gave."""
    for key, value in vars(model_config).items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("_pdrop")):
            setattr(model_config, key, 0.0)
