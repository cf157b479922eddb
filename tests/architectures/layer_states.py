"""Compares the states that vLLM sends of every layer with transformers' `hidden_states`; without Ray.

`python -m tests.architectures.layer_states NAME...` prints one line of JSON for each architecture: the relative
distance of each layer, of the last without the final norm, and of rows that are shifted by one. All engines live in
this process.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cluster.models.hidden_layers import ProjectionBank
from cluster.vllm.engine import LayersToSend, scoring_arguments
from cluster.vllm.token_scoring import Scoring
from tests.architectures.models import ARCHITECTURES, make_tokenizer

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}

DEPTH, RANK, CONTEXT_TOKENS = 4, 6, 256
SEQUENCES = [[(7 + 13 * place + 31 * row) % 600 for place in range(40 + 30 * row)] for row in range(3)]


def write_deep_model(name: str, folder: Path) -> None:
    """Write a random model of four layers."""
    config = ARCHITECTURES[name]()
    config.num_hidden_layers = DEPTH
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * DEPTH)[:DEPTH]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def engine_states(folder: Path, to_send: LayersToSend) -> list[torch.Tensor]:
    """Return what the engine sends of each sequence, [tokens, width + widths]."""
    from vllm import LLM, PoolingParams
    from vllm.config import PoolerConfig
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=CONTEXT_TOKENS,
        max_num_batched_tokens=CONTEXT_TOKENS,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=1 << 27,
        disable_log_stats=True,
        pooler_config=PoolerConfig(task="token_embed"),
        **scoring_arguments(Scoring(layers=to_send)),
    )
    try:
        prompts: Any = [{"prompt_token_ids": sequence} for sequence in SEQUENCES]
        params = PoolingParams(task="token_embed", use_activation=False)
        answers = llm.encode(prompts, params, pooling_task="token_embed", use_tqdm=False)
        return [answer.outputs.data for answer in answers]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@torch.no_grad()
def model_states(folder: Path) -> list[list[torch.Tensor]]:
    """Return transformers' states of layers 1 to DEPTH of each sequence, and last that of DEPTH before the norm."""
    # Not torch's attention, which leaves out Gemma 2's cap.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    before_norm: list[torch.Tensor] = []
    decoder = model.get_decoder()
    norm = next(getattr(decoder, name) for name in ("norm", "ln_f") if hasattr(decoder, name))
    norm.register_forward_pre_hook(lambda _module, inputs: before_norm.append(inputs[0][0].clone()))
    found = []
    for sequence in SEQUENCES:
        decoded = decoder(input_ids=torch.tensor([sequence]), use_cache=False, output_hidden_states=True)
        found.append([*(states[0] for states in decoded.hidden_states[1:]), before_norm[-1]])
    return found


def distance(some: torch.Tensor, others: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(some - others) / torch.linalg.vector_norm(others))


def random_bank(width: int, layers: tuple[int, ...]) -> ProjectionBank:
    random = torch.Generator().manual_seed(1)
    shape = (len(layers), RANK, width)
    projections = {side: torch.randn(shape, generator=random) for side in ("student", "teacher")}
    means = {side: torch.randn(shape[0], width, generator=random) for side in ("student", "teacher")}
    depths = dict.fromkeys(("student", "teacher"), DEPTH)
    return ProjectionBank(dict.fromkeys(("student", "teacher"), layers), depths, projections, means)  # type: ignore[arg-type]


def try_model(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_deep_model(name, path)
        expected = model_states(path)
        width = expected[0][0].shape[1]
        layers = tuple(range(1, DEPTH + 1))
        sent = [states.split(width, dim=-1) for states in engine_states(path, LayersToSend(layers))]
        bank = random_bank(width, layers)
        bank.save(path / "bank")
        projected = engine_states(path, LayersToSend(layers, str(path / "bank"), bank.digest))
    by_bank = [
        torch.cat([bank.project("teacher", layer, states[layer - 1]) for layer in layers], -1) for states in expected
    ]
    pairs = list(zip(sent, expected, strict=True))
    return {
        "model": name,
        "layers": [max(distance(got[layer], due[layer - 1]) for got, due in pairs) for layer in layers],
        "last": max(distance(got[0], due[DEPTH - 1]) for got, due in pairs),
        "last without norm": min(distance(got[0], due[DEPTH]) for got, due in pairs),
        "shifted": min(distance(got[layer][1:], due[layer - 1][:-1]) for got, due in pairs for layer in layers),
        "projected": max(distance(got[:, width:], due) for got, due in zip(projected, by_bank, strict=True)),
        "widths": [sent[0][0].shape[1], projected[0].shape[1] - width],
    }


def main() -> int:
    torch.set_num_threads(2)
    for name in sys.argv[1:]:
        sys.stdout.write(json.dumps(try_model(name)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
