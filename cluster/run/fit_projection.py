"""Fits a run's projection bank to what its student writes: `preceptor fit-projection`, before the run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.config.sections import StudentConfig
from cluster.config.stages import TeacherConfig
from cluster.config.terms import PolicyGradientTerm, RepresentationTerm
from cluster.contracts.errors import ConfigError, ModelError
from cluster.models.fit_bank import LayerFit, fit_bank
from cluster.models.hidden_layers import ProjectionBank, chosen_layers, paired_layers
from cluster.run.inputs import load_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPTS_AT_ONCE = 16
SAMPLED_ONLY = ObjectiveConfig(support="sampled", terms={"main": PolicyGradientTerm()})  # needs no states


@dataclass(frozen=True)
class FitOptions:
    """Says what a bank is fitted to."""

    rank: int  # dimensions of each layer
    rows: int  # tokens whose states are kept, at most
    teacher: str | None = None  # of [teachers.NAME]; None: the only one that prompts name


def fit_bank_of_run(config: Config, options: FitOptions) -> list[str]:
    """Sample the run's training prompts with its student, fit the bank that the run file names, and write it.

    Both models run by transformers, in this process, on the GPU if there is one. Returns lines for the user.

    Raises:
        ConfigError: the run file names no bank, or several teachers and no option says which one.
    """
    term = _banked_term(config)
    name = _teacher(config, options)
    # The run's own objective needs the bank that is to be made.
    inputs = load_inputs(msgspec.structs.replace(config, objective=SAMPLED_ONLY))
    student, teacher = load(config.student), load(config.teachers[name])
    depths = tuple(model.config.get_text_config().num_hidden_layers for model in (student, teacher))
    layers = chosen_layers(term.layers, depths[0])
    pairs = dict(zip(layers, paired_layers(layers, *depths), strict=True))
    prompts = [
        inputs.prompts.prompt(index).token_ids.tolist() for index in inputs.train.take(0, inputs.train.num_prompts)
    ]
    rollouts = sample(student, prompts, config)
    of_student, of_teacher = collect((student, teacher), (list(pairs), list(pairs.values())), rollouts, options.rows)
    bank, fits = fit_bank(of_student, of_teacher, pairs, (depths[0], depths[1]), options.rank)
    assert term.bank is not None, "`_banked_term` says so"
    bank.save(Path(term.bank))
    return describe(term.bank, bank, fits)


def describe(path: str, bank: ProjectionBank, fits: Sequence[LayerFit]) -> list[str]:
    """Return the bank's lines for the user."""
    lines = [
        f"layer {fit.student_layer} of the student, {fit.teacher_layer} of the teacher: the components hold "
        f"{fit.teacher_share:.1%} of the teacher's variance, and the student's map explains {fit.student_share:.1%} of "
        "theirs on held-out rows"
        for fit in fits
    ]
    num_bytes = 2 * bank.rank * len(fits)
    return [*lines, f"{path}: rank {bank.rank}, {num_bytes} bytes a token in bfloat16, hash {bank.digest}"]


def load(section: StudentConfig | TeacherConfig) -> "PreTrainedModel":
    """Read a model for inference, in float32 on a CPU and in its files' dtype on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            section.model,
            dtype="auto" if on_gpu else torch.float32,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model '{section.model}': cannot load its weights: {error}") from error
    return model.to("cuda" if on_gpu else "cpu").eval()


def sample(student: "PreTrainedModel", prompts: Sequence[list[int]], config: Config) -> Iterator[tuple[list[int], int]]:
    """Yield token ids and how many of them are the prompt's, as the run's student writes them."""
    import torch

    torch.manual_seed(config.run.seed)
    rollout = config.rollout
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "max_new_tokens": rollout.max_completion_tokens,
        "pad_token_id": 0,
    }
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        chosen = prompts[first : first + PROMPTS_AT_ONCE]
        width = max(map(len, chosen))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in chosen])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in chosen])
        with torch.inference_mode():
            written = student.generate(ids.to(student.device), attention_mask=mask.to(student.device), **settings)
        for prompt, row in zip(chosen, written[:, width:].tolist(), strict=True):
            yield prompt + _until_end(row, student), len(prompt)


def collect(
    models: "tuple[PreTrainedModel, PreTrainedModel]",
    layers: tuple[Sequence[int], Sequence[int]],
    rollouts: Iterator[tuple[list[int], int]],
    max_rows: int,
) -> "list[dict[int, Tensor]]":
    """Return, of each model, layer -> its states [rows, width] at the rows that predict sampled tokens."""
    import torch

    kept: list[dict[int, list[Tensor]]] = [{layer: [] for layer in of_model} for of_model in layers]
    num_rows = 0
    for token_ids, prompt_tokens in rollouts:
        for model, states in zip(models, kept, strict=True):
            ids = torch.tensor([token_ids], device=model.device)
            with torch.inference_mode():
                decoded = model.get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=True)
            for layer, parts in states.items():
                parts.append(decoded.hidden_states[layer][0, prompt_tokens - 1 : -1].cpu())
        num_rows += len(token_ids) - prompt_tokens
        if num_rows >= max_rows:
            break
    return [{layer: torch.cat(parts)[:max_rows] for layer, parts in states.items()} for states in kept]


def _until_end(row: list[int], model: "PreTrainedModel") -> list[int]:
    """Return a completion up to its first end, which is one of its tokens."""
    end = getattr(model.generation_config, "eos_token_id", None)
    ends = {end} if isinstance(end, int) else set(end or ())
    last = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: last + 1]


def _banked_term(config: Config) -> RepresentationTerm:
    for term in config.objective.terms.values():
        if isinstance(term, RepresentationTerm) and term.bank is not None:
            return term
    raise ConfigError(
        "objective.terms: no representation term names a bank; write bank = 'FILE', which is the file to be made, and "
        "the layers that it is for"
    )


def _teacher(config: Config, options: FitOptions) -> str:
    name = options.teacher or (config.routes[0] if len(config.routes) == 1 else None)
    if name not in config.teachers:
        raise ConfigError(f"--teacher is {name}; expected one of {', '.join(config.teachers)}")
    assert name is not None
    return name
