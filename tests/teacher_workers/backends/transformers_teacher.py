"""A teacher backend that transformers runs, in the test's own process, and tiny models with tokenizers of their own."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cluster.config.stages import TeacherConfig
from cluster.contracts.trajectory import Bytes, Ints
from cluster.models.lm_head import load_lm_head
from cluster.models.weight_files import fingerprint
from tests.teacher_workers.hidden_states import HiddenStatesBackend


class TransformersBackend(HiddenStatesBackend):
    """Computes hidden states row by row, in float32."""

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        super().__init__(load_lm_head(teacher.model, False, "float32", (), teacher.stop_class))
        self._model = AutoModelForCausalLM.from_pretrained(teacher.model, dtype=torch.float32)

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        return fingerprint(teacher.model)

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        with torch.no_grad():
            ids = torch.from_numpy(token_ids.astype("int64"))[None]
            return self._model.model(input_ids=ids).last_hidden_state[0, loss_mask.nonzero()[0] - 1], 0


BACKEND = f"{__name__}:TransformersBackend"


def write_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, order: torch.Tensor | None = None
) -> str:
    """Write a random model with a tokenizer; with an `order`, row i of its embedding becomes row order[i]."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = Qwen3ForCausalLM(config)
    if order is not None:
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            moved = weight.clone()
            moved[order] = weight[: len(order)]
            weight.copy_(moved)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
