"""Builds vLLM's schedulers, and ours on top of them, without an engine."""

from pathlib import Path
from typing import Any

import torch

BLOCK = 16  # tokens of a block


def make_scheduler(model: Path, name: str, **arguments: Any) -> tuple[Any, Any]:
    """Return a scheduler that runs two requests at a time, and what hashes the blocks of its requests."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    common = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 2, "block_size": BLOCK}
    config = EngineArgs(str(model), skip_tokenizer_init=True, **common, **arguments).create_engine_config()
    config.cache_config.num_gpu_blocks = 64
    group = KVCacheGroupSpec(["layer"], FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32))
    scheduler: Any = resolve_obj_by_qualname(name)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[group]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )
    hashing = get_hash_fn_by_name("sha256")
    init_none_hash(hashing)
    return scheduler, get_request_block_hasher(BLOCK, hashing)
