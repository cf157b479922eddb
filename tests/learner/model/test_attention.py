"""Packed attention: trajectories do not see each other, and each comes out as it does alone."""

import sys
from types import ModuleType

import pytest
import torch
from transformers import DeepseekV3Config, Gemma2ForCausalLM, MistralConfig, Qwen3Config, StableLmConfig

from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.contracts.errors import ModelError
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.loss.objective import Objective
from learner.loss.tokens import Evaluation
from learner.model.attention import KERNELS, Packing, Segments, choose_kernel, fault_of, grouped, packed_attention
from learner.model.student import load_student
from tests.learner.support import OBJECTIVES, SMALL

CPU = torch.device("cpu")
LENGTHS = (7, 1, 3, 16, 2, 9)


def rows(*heads, width=8):
    random = torch.Generator().manual_seed(3)
    shapes = [(sum(LENGTHS), count, width) for count in heads]
    return [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes]


def plain(query, key, value, scale):
    """Causal attention of one sequence by its definition; [tokens, heads, width]."""
    share = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(share, 1) for part in (key, value))
    scores = torch.einsum("qhw,khw->hqk", query, key) * scale
    later = torch.ones(len(query), len(query)).triu(1).bool()
    return torch.einsum("hqk,khw->qhw", scores.masked_fill(later, -torch.inf).softmax(-1), value)


def test_segments_bring_every_token_back_to_its_place():
    segments = Segments.of(LENGTHS, CPU)
    assert segments.boundaries.tolist() == [0, 7, 8, 11, 27, 29, 38]
    assert segments.longest == 16
    assert segments.padded[segments.order].tolist() == list(range(38))
    assert segments.grids == ((1, 1), (1, 2), (1, 3), (1, 7), (2, 16))


def test_padding_at_most_doubles_the_tokens():
    lengths = [*range(1, 200), *[1] * 200]  # together they would be padded fourfold
    assert len(Segments.of(lengths, CPU).padded) < 2 * sum(lengths)


@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2), (4, 1, 1)])
def test_each_sequence_gets_what_it_gets_alone(heads):
    query, key, value = rows(*heads)
    found = grouped(query, key, value, Segments.of(LENGTHS, CPU), scale=0.3)
    alone = [
        plain(*parts, scale=0.3) for parts in zip(*(part.split(LENGTHS) for part in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone))
    gradients = [torch.autograd.grad(each.square().sum(), (query, key, value)) for each in (found, torch.cat(alone))]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_no_gradient_passes_from_one_sequence_to_another():
    parts = rows(4, 2, 2)
    found = grouped(*parts, Segments.of(LENGTHS, CPU), scale=0.3)
    first, last = 11, 27  # the fourth sequence
    for gradient in torch.autograd.grad(found[first:last].square().sum(), parts):
        assert gradient[first:last].abs().sum() > 0
        assert not gradient[:first].any()
        assert not gradient[last:].any()


def grids_of(scored):
    found = trajectories([scored])
    (grids,) = plan_step([len(row.token_ids) for row in found], 1, micro_batch_tokens=96)
    return found, grids


def student_with(attention, folder, **settings):
    config = LearnerConfig(dtype="float32", attention=attention, **settings)
    return load_student(StudentConfig(model=str(folder)), config)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_packed_and_masked_students_say_and_learn_the_same(student_folder, scored, gradient_checkpointing):
    packed = student_with("grouped", student_folder, gradient_checkpointing=gradient_checkpointing)
    masked = student_with("masked", student_folder)
    found, grids = grids_of(scored)
    for grid in grids:
        batch = build_micro_batch(grid, found, seed=0)
        assert len(batch.places) == sum(batch.lengths)
        whole_grid = masked._masked(batch, {}).last_hidden_state.flatten(0, 1)
        hidden = [packed._packed(batch, grouped, {}).last_hidden_state[0], whole_grid[batch.places]]
        torch.testing.assert_close(*hidden, atol=2e-6, rtol=1e-5)
        for states in hidden:
            states.square().sum().backward()
    for (name, one), other in zip(packed.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-3, rtol=1e-4, msg=name)


def test_a_trajectory_has_no_gradient_by_the_tokens_of_another(student_folder, scored):
    """The embeddings of a packed row are the input here, so that each token has a gradient of its own."""
    student = student_with("grouped", student_folder)
    lengths, random = (6, 11, 4), torch.Generator().manual_seed(0)
    embedded = torch.randn(1, sum(lengths), SMALL["hidden_size"], generator=random, requires_grad=True)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packing = Packing(Segments.of(lengths, CPU), grouped)
    decoder = student.causal_lm.get_decoder()
    states = decoder(inputs_embeds=embedded, position_ids=positions, packing=packing, use_cache=False)[0][0]
    (gradient,) = torch.autograd.grad(states[6:17].square().sum(), embedded)
    assert gradient[0, 6:17].abs().sum() > 0
    assert not gradient[0, :6].any()
    assert not gradient[0, 17:].any()


def test_an_empty_micro_batch_goes_through(student_folder, scored):
    student = student_with("grouped", student_folder)
    found = Evaluation(*student(build_micro_batch((), trajectories([scored]), seed=0)))
    found.loss.backward()
    assert found.loss == 0
    assert len(found.logprobs) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_left_to_models_with_windows(dtype):
    assert choose_kernel("auto", Qwen3Config(**SMALL), CPU, dtype) is grouped
    assert choose_kernel("auto", MistralConfig(**SMALL, sliding_window=4), CPU, dtype) is None
    assert choose_kernel("auto", StableLmConfig(**SMALL), CPU, dtype) is None  # its layers do not pass packings on
    assert choose_kernel("masked", Qwen3Config(**SMALL), CPU, dtype) is None


@pytest.mark.parametrize("attention", ["flash", "varlen"])
def test_a_kernel_that_is_not_there_is_one_sentence(attention):
    with pytest.raises(ModelError, match=f'learner.attention = "{attention}" does not work here: ') as error:
        choose_kernel(attention, Qwen3Config(**SMALL), CPU, torch.bfloat16)
    assert "\n" not in str(error.value)


def test_the_probe_finds_no_fault_in_attention_that_is_right():
    assert fault_of("grouped", CPU, torch.bfloat16, widths=(64, 64)) is None
    assert fault_of("grouped", CPU, torch.bfloat16, widths=(48, 32)) is None


def test_a_model_with_a_window_says_so(tmp_path):
    window = MistralConfig(**SMALL, sliding_window=4)
    with pytest.raises(ModelError, match="asks its attention for sliding_window"):
        packed_attention(
            torch.nn.Identity(),
            *(torch.ones(1, 2, 3, 4) for _ in range(3)),
            None,
            packing=Packing(Segments.of([3], CPU), grouped),
            sliding_window=window.sliding_window,
        )


def test_a_model_with_capped_attention_is_refused_when_it_is_loaded(tmp_path):
    Gemma2ForCausalLM(Gemma2ForCausalLM.config_class(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r'set learner\.attention = "masked"'):
        student_with("grouped", tmp_path)


def test_torchs_own_kernel_takes_what_it_is_given():
    """There is no such kernel on CPU; on the meta device torch checks the call and works out the shape."""
    meta = torch.device("meta")
    query, key, value = (torch.empty(38, heads, 64, dtype=torch.bfloat16, device=meta) for heads in (4, 2, 2))
    assert KERNELS["varlen"]()(query, key, value, Segments.of(LENGTHS, meta), 0.125).shape == query.shape


FLASH = """
import torch
from torch.nn import functional

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False):
    share, bounds = q.shape[1] // k.shape[1], cu_seqlens_q.tolist()
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(bounds, bounds[1:])), "the longest sequence"
    assert cu_seqlens_q.dtype == torch.int32 and dropout_p == 0.0
    def one(first, last):
        parts = (q[first:last], *(part[first:last].repeat_interleave(share, 1) for part in (k, v)))
        taken = (part.transpose(0, 1) for part in parts)
        return functional.scaled_dot_product_attention(*taken, is_causal=causal, scale=softmax_scale).transpose(0, 1)
    return torch.cat([one(a, b) for a, b in zip(bounds, bounds[1:])])
"""
LATENT = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}


@pytest.fixture
def install_flash(monkeypatch):
    """Return a function that makes a package of that name, since the real one has no CPU kernel."""

    def install(source):
        module = ModuleType("flash_attn")
        exec(source, module.__dict__)
        monkeypatch.setitem(sys.modules, "flash_attn", module)

    return install


def test_flash_attention_is_called_as_its_documentation_says(install_flash):
    install_flash(FLASH)
    parts, segments = rows(4, 2, 2), Segments.of(LENGTHS, CPU)
    torch.testing.assert_close(KERNELS["flash"]()(*parts, segments, 0.3), grouped(*parts, segments, 0.3))
    assert choose_kernel("flash", Qwen3Config(**SMALL), CPU, torch.bfloat16) is not None


def test_a_flash_attention_that_computes_something_else_is_refused(install_flash):
    install_flash(FLASH.replace("is_causal=causal", "is_causal=False"))
    with pytest.raises(ModelError, match="it differs from plain attention by"):
        choose_kernel("flash", Qwen3Config(**SMALL), CPU, torch.bfloat16)


def test_a_flash_attention_whose_gradients_are_not_numbers_is_refused(install_flash):
    signature = "                           softmax_scale=None, causal=False):\n"
    install_flash(
        FLASH.replace(signature, signature + "    v.register_hook(lambda gradient: gradient * float('nan'))\n")
    )
    with pytest.raises(ModelError, match="it differs from plain attention by nan"):
        choose_kernel("flash", Qwen3Config(**SMALL), CPU, torch.bfloat16)


def test_flash_attention_that_cannot_take_the_models_heads_is_refused_before_the_model_is_loaded(install_flash):
    signature = "                           softmax_scale=None, causal=False):\n"
    refusal = "    if q.shape[-1] != v.shape[-1]: raise RuntimeError(f'{q.shape[-1]} is not {v.shape[-1]}')\n"
    install_flash(FLASH.replace(signature, signature + refusal))
    assert choose_kernel("flash", Qwen3Config(**SMALL), CPU, torch.bfloat16) is not None
    with pytest.raises(ModelError, match="48 is not 32"):
        choose_kernel("flash", DeepseekV3Config(**LATENT), CPU, torch.bfloat16)


def test_compiled_layers_keep_the_names_of_their_parameters_and_their_place_under_checkpointing(student_folder):
    plain = student_with("grouped", student_folder)
    compiled = student_with("grouped", student_folder, compile=True, gradient_checkpointing=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    layers = compiled.causal_lm.model.layers
    assert all(layer._compiled_call_impl is not None and layer.gradient_checkpointing for layer in layers)
    assert all(layer._compiled_call_impl is None for layer in plain.causal_lm.model.layers)


@pytest.mark.exhaustive
@pytest.mark.timeout(300)  # a C++ compiler runs, for 13 s in all where nothing else does
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["grouped", "masked"])
def test_compiled_layers_say_and_learn_the_same(student_folder, scored, attention, gradient_checkpointing):
    plain = student_with(attention, student_folder)
    compiled = student_with(attention, student_folder, compile=True, gradient_checkpointing=gradient_checkpointing)
    rows = trajectories([scored])
    for grid in (((0, 1), (2, 3)), ((4,),), ((1, 2, 3),)):  # other lengths, other groups
        batch = build_micro_batch(grid, rows, seed=0)
        found = []
        for student in (plain, compiled):
            student.zero_grad()
            result = Evaluation(*student(batch, Objective(OBJECTIVES["topk"])))
            result.loss.backward()
            found.append((result.logprobs, [parameter.grad.clone() for parameter in student.parameters()]))
        torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
        for one, other in zip(found[1][1], found[0][1], strict=True):  # sums of numbers as large as the largest
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
