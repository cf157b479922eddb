"""Runs the student: packed grids in, what an objective makes of their completion tokens out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.config.sections import StudentConfig
from cluster.config.stages import HeadDtype, LearnerConfig
from cluster.contracts.errors import ModelError
from cluster.models.lm_head import check_tied_head, multiplies_wide, read_logit_scaling
from cluster.models.model_files import is_local, load_model_config
from cluster.weight_sync.manifest import Manifest
from learner.batching.micro_batch import MicroBatch, Trajectory, build_micro_batch
from learner.loss.tokens import Evaluation
from learner.model.attention import (
    Kernel,
    Packing,
    Segments,
    choose_kernel,
    plain_attention,
    register_packed_attention,
)
from learner.model.checkpoint_format import CheckpointFormat
from learner.model.completion_head import CompletionHead, TeacherHeads
from learner.model.projection import LogitScaling
from learner.model.wide_products import widen

if TYPE_CHECKING:
    from learner.loss.objective import Objective  # given to the calls; loading it is not needed

HOST = torch.device("cpu")
LEAST_LAYERS = 2  # that check the forward of a model which ZeRO stage 3 shards
PROBE_LENGTHS = (5, 3)  # tokens of the two sequences that check the forward when a model is loaded
# Of a log-probability near 0, and how far below 0 it must be for as much again. Probes are no text, so theirs are far
# below: SmolLM2 without ten layers gives one -22.9, and in bfloat16 -22.3 or -22.96, by how threads share sums.
PROBE_TOLERANCE, TOLERANCE_DOUBLES_AT = {torch.float32: 1e-3, torch.bfloat16: 0.25}, 8.0


def load_student(
    student: StudentConfig, config: LearnerConfig, device: torch.device = HOST, reads_weights: bool = True
) -> "Student":
    """Read the model that learns, under ZeRO stage 3 into host memory; raise ModelError if it cannot be trained.

    Without `reads_weights` its values are anything: ZeRO stage 3 sends all ranks those of rank 0, one parameter after
    the other, and memory that nothing has written to takes none of the host's.
    """
    model_config = load_model_config(student.model, student.trust_remote_code)
    _disable_noise(model_config)
    kernel = choose_kernel(config.attention, model_config, device, getattr(torch, config.dtype))
    attention = plain_attention(model_config) if kernel is None else register_packed_attention()
    if reads_weights:
        causal_lm = _read(student, config, model_config, attention)
        check_tied_head(student.model, model_config)
    else:
        causal_lm = _without_values(student, config, model_config, attention)
    model = Student(causal_lm, kernel, config.head_dtype)
    if multiplies_wide(getattr(torch, config.dtype), device):
        widen(causal_lm)
    if config.zero_stage == 3:
        if reads_weights:
            with first_layers(causal_lm):  # the whole model would be slow on the CPU, and too much for one GPU
                check_forward(model.to(device), student.model)
                model.to("cpu")
    else:
        check_forward(model.to(device), student.model)
    if config.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        compile_layers(causal_lm)
        # Left as it is: every number of groups of lengths would be compiled anew.
        model.kernel = None if kernel is None else torch.compiler.disable(kernel)
    model.train()
    return model


def _read(student: StudentConfig, config: LearnerConfig, model_config: Any, attention: str) -> PreTrainedModel:
    causal_lm: PreTrainedModel
    try:
        causal_lm, loaded = AutoModelForCausalLM.from_pretrained(
            student.model,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            use_safetensors=True,  # anything else is a pickle, which can run code
            output_loading_info=True,
            trust_remote_code=student.trust_remote_code,
            local_files_only=is_local(student.model) and Path(student.model).is_dir(),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"student '{student.model}': cannot load its weights: {reason}") from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ModelError(
            f"student '{student.model}': its safetensors lack {len(missing)} of its parameters, first '{missing[0]}'; "
            "random ones would take their place, so save the whole model again"
        )
    return causal_lm


def _without_values(
    student: StudentConfig, config: LearnerConfig, model_config: Any, attention: str
) -> PreTrainedModel:
    """Build the model as it would be read, with parameters and buffers of any value."""
    with torch.device("meta"):
        causal_lm: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            trust_remote_code=student.trust_remote_code,
        )
    if any(isinstance(value, Tensor) for module in causal_lm.modules() for value in vars(module).values()):
        return _read(student, config, model_config, attention)  # it keeps tensors that rank 0 does not send
    causal_lm._apply(lambda tensor: torch.empty_like(tensor, device=HOST))
    causal_lm.tie_weights()
    return causal_lm


@contextmanager
def first_layers(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Let the model have only its first layers, one of each kind among them, for as long as the context lasts."""
    decoder = causal_lm.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        yield
        return
    kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None) or [""] * len(layers)
    # A layer is called with the mask of its place, so they stay the first.
    of_kind = {
        (kind, *map(type, layer.children())): place
        for place, (kind, layer) in reversed([*enumerate(zip(kinds, layers, strict=False))])
    }
    decoder.layers = layers[: max(LEAST_LAYERS, *(place + 1 for place in of_kind.values()))]
    try:
        yield
    finally:
        decoder.layers = layers


def compile_layers(causal_lm: PreTrainedModel) -> None:
    """Let torch compile every decoder layer, in place: parameters keep their names. Lengths may vary.

    Layers of one kind have the same code, so that all but the first take it from torch's cache.
    """
    for layer in causal_lm.get_decoder().layers:
        layer.compile(dynamic=True)


class Student(nn.Module):
    """Wraps a causal LM; parameters keep their Hugging Face names under `causal_lm`.

    Args:
        causal_lm: loaded with `packed_attention` if there is a kernel.
        kernel: attends within trajectories; None: transformers masks what lies between them.
        head_dtype: of the logits; None: float32 where it costs nothing.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, kernel: Kernel | None = None, head_dtype: HeadDtype | None = None
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.kernel = kernel
        scaling = LogitScaling(*read_logit_scaling(causal_lm.config))
        self.head = CompletionHead(causal_lm.get_output_embeddings(), scaling, head_dtype)
        self.checkpoint_format = CheckpointFormat(causal_lm)

    def manifest(self, dtype: str) -> Manifest:
        """Describe every tensor of the checkpoint as it travels in the given dtype; tied parameters appear once."""
        return self.checkpoint_format.manifest(dtype)

    def forward(
        self, batch: MicroBatch, objective: "Objective | None" = None, teacher_heads: TeacherHeads | None = None
    ) -> tuple[Tensor, ...]:
        """Return Evaluation's fields as a plain tuple; without an objective, the losses are 0."""
        depth = self.causal_lm.config.get_text_config().num_hidden_layers
        layers = () if objective is None else objective.student_layers(depth)
        # Of each layer, or of none: the model returns all that it has computed.
        further = {"output_hidden_states": True} if any(layer < depth for layer in layers) else {}
        if self.kernel is None:
            decoded, predicting = self._masked(batch, further), batch.predicting
        else:
            decoded = self._packed(batch, self.kernel, further)
            predicting = torch.searchsorted(batch.places, batch.predicting)

        def predict(states: Tensor) -> Tensor:
            return states.flatten(0, 1).index_select(0, predicting)

        hidden = predict(decoded.last_hidden_state)
        states = {layer: hidden if layer == depth else predict(decoded.hidden_states[layer]) for layer in layers}
        return self.head(hidden, batch, objective, teacher_heads or {}, states, depth)

    def _masked(self, batch: MicroBatch, further: dict[str, Any]) -> Any:
        """Return what the decoder says of the whole grid."""
        ids, positions = batch.input_ids, batch.position_ids
        return self.causal_lm.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **further)

    def _packed(self, batch: MicroBatch, kernel: Kernel, further: dict[str, Any]) -> Any:
        """Return the same of one row of all tokens, without the grid's padding."""
        ids, positions = (part.flatten()[batch.places][None] for part in (batch.input_ids, batch.position_ids))
        packing = Packing(Segments.of(batch.lengths, ids.device), kernel)
        further = {**further, "packing": packing}
        return self.causal_lm.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **further)


def check_forward(student: Student, name: str) -> None:
    """Compare log-probabilities of two packed sequences with those of the model's own forward on each alone.

    Leaves the student in evaluation mode.

    Raises:
        ModelError: they differ: packed sequences see each other, or the model treats its logits in an unknown way.
    """
    rows = [_probe_row(length, len(student.head.weight)) for length in PROBE_LENGTHS]
    device = student.head.weight.device
    student.eval()
    with torch.no_grad():
        packed = Evaluation(*student(build_micro_batch(((0, 1),), rows, seed=0).to(device))).logprobs
        sequences = [torch.from_numpy(row.token_ids).to(device) for row in rows]
        alone = torch.cat([_logprobs_alone(student.causal_lm, token_ids) for token_ids in sequences])
    differences = (packed - alone).abs()
    limits = PROBE_TOLERANCE[student.head.weight.dtype] * (1 + alone.abs() / TOLERANCE_DOUBLES_AT)
    if not (differences <= limits).all():
        difference = differences.max().item()
        raise ModelError(
            f"student '{name}': log-probabilities of two packed sequences differ by {difference:.2g} from those of its "
            "own forward on each alone; the learner supports decoder-only attention models whose logits are scaled by "
            "logit_scale, logits_scaling or final_logit_softcapping"
            + ("" if student.kernel is None else '; this one may need learner.attention = "masked"')
        )


def _logprobs_alone(causal_lm: PreTrainedModel, token_ids: Tensor) -> Tensor:
    logits = causal_lm(input_ids=token_ids.unsqueeze(0), use_cache=False).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(-1, token_ids[1:].unsqueeze(-1)).squeeze(-1)


def _probe_row(length: int, vocabulary: int) -> Trajectory:
    token_ids = ((1 + torch.arange(length) * 7) % vocabulary).numpy()
    loss_mask = (torch.arange(length) > 0).numpy()
    nothing = torch.zeros(length - 1).numpy()
    no_candidates = nothing[:, None][:, :0]
    return Trajectory(0, "", 0.0, token_ids, loss_mask, nothing, no_candidates, no_candidates, {}, {})


def _disable_noise(model_config: Any) -> None:
    """Switch off what makes a training forward another one than the rollout worker's, which sampled.

    That is dropout and the jitter of routers. Routers also need not record what only their own losses read: the
    objective has none of them.
    """
    for key, value in vars(model_config).items():
        if isinstance(value, float) and ("dropout" in key or "jitter" in key or key.endswith("_pdrop")):
            setattr(model_config, key, 0.0)
    if getattr(model_config, "output_router_logits", False):
        model_config.output_router_logits = False
