"""Writes the student as a Hugging Face directory, from a running group or from a checkpoint's files.

A checkpoint holds float32 masters, cut as DeepSpeed cuts them: stages 1 and 2 flatten all parameters to one vector and
give each rank an equal part of it; stage 3 gives each rank a part of every parameter, the last one padded.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cluster.config.run_config import Config
from cluster.contracts.errors import CheckpointError
from cluster.models.model_files import load_tokenizer
from cluster.weight_sync.manifest import plan_buckets
from learner.checkpointing.checkpoint import begin, discard, publish
from learner.checkpointing.manifest import Layout, shard_name, verify
from learner.checkpointing.shards import WEIGHTS
from learner.engines.base import TrainEngine
from learner.model.student import load_student

ALIGNMENT = 2  # DeepSpeed pads a flat vector to a multiple of this times the ranks
GATHER_BYTES = 1 << 28  # of parameters that an export gathers at once


def export(engine: TrainEngine, config: Config, folder: Path) -> None:
    """Write the student of a group whose ranks call this together.

    Rank 0 holds one whole copy of the weights in host memory while it writes.
    """
    weights = _whole_state_dict(engine)
    if engine.rank == 0:
        _write(engine.student.causal_lm, weights, config, folder)


def export_checkpoint(config: Config, checkpoint: Path, folder: Path) -> None:
    """Write the student that a checkpoint of the run holds, in this process alone.

    It takes host memory for the model, and for the masters in float32.

    Raises:
        CheckpointError: the checkpoint is damaged or of another student, or the folder cannot be written.
        ModelError: the student of the run's configuration cannot be read.
    """
    layout = Layout.of(config.learner)
    verify(checkpoint, layout)
    student = load_student(config.student, replace(config.learner, attention="masked", zero_stage=0, num_workers=1))
    parameters = dict(student.causal_lm.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, master in whole_parameters(checkpoint, layout, shapes):
            parameters[name].copy_(master)
    _write(student.causal_lm, None, config, folder)


def whole_parameters(
    checkpoint: Path, layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Give every parameter's master, whole; `shapes` is in the order of the model's parameters."""
    ranks = [_masters(checkpoint / shard_name(rank)) for rank in range(layout.num_ranks)]
    if layout.zero_stage == 0:
        flat = [torch.cat([part.flatten() for part in ranks[0]])]
    elif layout.zero_stage == 3:
        flat = [torch.cat(parts) for parts in ranks]  # a rank's parts of all parameters, one after the other
    else:
        flat = [torch.cat([part for parts in ranks for part in parts])]
    held, needed = len(flat[0]), sum(-(-math.prod(shape) // len(flat)) for shape in shapes.values())
    if not 0 <= held - needed < ALIGNMENT * layout.num_ranks:
        raise CheckpointError(
            f"checkpoint {checkpoint}: it holds {held} weights a part, and the run's student needs {needed}; put the "
            "student's files back that the run was started with"
        )
    start = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        end = start + -(-size // len(flat))
        yield name, torch.cat([part[start:end] for part in flat])[:size].view(shape)
        start = end


def _masters(shard: Path) -> list[Tensor]:
    try:
        with safe_open(shard, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(f".{WEIGHTS}")]  # noqa: SIM118
            return [tensors.get_tensor(name) for name in sorted(names, key=lambda name: int(name.partition(".")[0]))]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {shard.parent}: cannot read {shard.name}: {error}") from error


def _write(causal_lm: PreTrainedModel, weights: dict[str, Tensor] | None, config: Config, folder: Path) -> None:
    """Write model, generation settings and tokenizer; without weights, the model's own. Complete or absent."""
    student = config.student
    tokenizer = load_tokenizer(student.model, student.trust_remote_code)
    if causal_lm.generation_config is not None:
        causal_lm.generation_config = finished_settings(
            causal_lm.generation_config, tokenizer, config.rollout.stop_token_ids
        )
    partial = begin(folder)
    try:
        # transformers would bring the model's own weights into the checkpoint's form; those of a group are in it.
        causal_lm.save_pretrained(partial, state_dict=weights, save_original_format=weights is None)
        tokenizer.save_pretrained(partial)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        discard(folder)
        raise CheckpointError(
            f"export {folder}: cannot be written: {error}; the last checkpoint has the student, so when the cause is "
            f"gone, preceptor export {config.run.directory}/{config.run.name} writes it"
        ) from error
    publish(folder)


def finished_settings(
    settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]
) -> GenerationConfig:
    """Return settings that end where the run's completions ended, and that transformers saves.

    It loads settings that it refuses to save, such as a temperature without `do_sample`; those that sampling does not
    mend are left out.
    """
    further = set(stop_ids)
    if further:
        own = settings.eos_token_id
        further |= {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
        settings.eos_token_id = sorted(further)
    if _is_saved(settings):
        return settings
    settings.do_sample = True
    if _is_saved(settings):
        return settings
    return GenerationConfig(
        bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id
    )


def _is_saved(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def _whole_state_dict(engine: TrainEngine) -> dict[str, Tensor]:
    dtype = str(engine.student.head.weight.dtype).removeprefix("torch.")
    weights: dict[str, Tensor] = {}
    for bucket in plan_buckets(engine.student.manifest(dtype), GATHER_BYTES):
        with engine.full_parameters([tensor.name for tensor in bucket]) as parameters:
            if engine.rank == 0:
                weights |= {name: value.to("cpu", copy=True) for name, value in parameters.items()}
    buffers = dict(engine.student.causal_lm.named_buffers())
    persistent = engine.student.causal_lm.state_dict().keys() & buffers.keys()
    kept = engine.student.checkpoint_format.convert({name: buffers[name] for name in persistent})
    return weights | {name: value.to("cpu", copy=True) for name, value in kept.items()}
