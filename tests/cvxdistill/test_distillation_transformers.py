"""distill on BERT, GPT-2 and ViT of the transformers library: tiny ones, with random weights."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import (  # noqa: E402
    capture,
    find_span,
    get_block,
    load_student,
    swap_block,
    teacher_gates,
)
from cvxdistill.solvers import RFISTA  # noqa: E402
from cvxdistill.solvers.random_order import random_order  # noqa: E402

SEQUENCES, LENGTH, WIDTH = 60, 9, 8
QUICK: dict[str, Any] = {"verbose": 0, "max_iter": 100, "alpha": 1e-3, "n_gates": 6, "n_neurons": 6}


class Case(NamedTuple):
    """A model, its batches, its feed-forward parts in order, its layers, and padding (N, T)."""

    model: nn.Module
    batches: list[Any]
    feed_forward: list[str]
    layers: list[str]
    keep: np.ndarray


def sequences(side: str) -> list[dict[str, Any]]:
    """Two batches of token ids with padding on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (SEQUENCES, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (SEQUENCES, 1), generator=generator)
    keep = torch.arange(LENGTH)[None] < lengths
    keep = keep if side == "right" else keep.flip(1)
    ids = ids.masked_fill(~keep, 0)
    half = SEQUENCES // 2
    return [
        {"input_ids": ids[part], "attention_mask": keep[part].long(), "labels": ids[part]}
        for part in (slice(half), slice(half, None))
    ]


def bert() -> Case:
    config = transformers.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=50, max_position_embeddings=LENGTH,
    )  # fmt: skip
    layers = [f"encoder.layer.{i}" for i in range(2)]
    parts = [f"{layer}.intermediate:{layer}.output.dense" for layer in layers]
    batches = sequences("right")
    return Case(transformers.BertModel(config), batches, parts, layers, kept(batches))


def gpt2() -> Case:
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=50, n_positions=LENGTH, bos_token_id=0,
        eos_token_id=0, use_cache=False,
    )  # fmt: skip
    layers = [f"h.{i}" for i in range(2)]
    # One as a span, one as the module that holds it.
    parts = ["h.0.mlp.c_fc:h.0.mlp.c_proj", "h.1.mlp"]
    batches = sequences("left")
    return Case(transformers.GPT2Model(config), batches, parts, layers, kept(batches))


def vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = transformers.ViTModel(config)
    layers = [f"layers.{i}" for i in range(2)]
    parts = [f"{layer}.mlp.fc1:{layer}.mlp.fc2" for layer in layers]
    images = torch.randn(SEQUENCES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = [{"pixel_values": images[:30]}, {"pixel_values": images[30:]}]
    return Case(model, batches, parts, layers, np.ones((SEQUENCES, 5), dtype=bool))


def kept(batches: list[dict[str, Any]]) -> np.ndarray:
    return np.concatenate([batch["attention_mask"].numpy() != 0 for batch in batches])


@pytest.fixture(scope="module", params=[bert, gpt2, vit], ids=["bert", "gpt2", "vit"])
def case(request) -> Case:
    torch.manual_seed(0)
    built = request.param()
    # Larger weights than those that training starts from: blocks that bend their inputs.
    for name, parameter in built.model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
            nn.init.normal_(parameter, std=0.3)
    built.model.eval()
    return built


def run(model: nn.Module, batches: list[dict[str, Any]]) -> torch.Tensor:
    """The last hidden states (N, T, d)."""
    with torch.no_grad():
        outputs = [
            model(**{key: value for key, value in batch.items() if key != "labels"})
            for batch in batches
        ]
    return torch.cat([output.last_hidden_state for output in outputs])


def recorded_by_hooks(model: nn.Module, name: str, batches: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a block, or a span by its two ends, takes and gives, (N, T, d) and (N, T, c)."""
    first, _, last = name.partition(":")
    taken, given = [], []

    def before(module, args, kwargs):
        taken.append(args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        given.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [
        get_block(model, first).register_forward_pre_hook(before, with_kwargs=True),
        get_block(model, last or first).register_forward_hook(after),
    ]
    run(model, batches)
    for handle in handles:
        handle.remove()
    return torch.cat(taken).numpy(), torch.cat(given).numpy()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], model: nn.Module) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in after)


def test_what_is_recorded_is_what_the_span_maps_without_padding(case):
    for name in (*case.feed_forward, *case.layers):
        taken, given = recorded_by_hooks(case.model, name, case.batches)
        recorded = capture(case.model, name, case.batches, verbose=0)
        np.testing.assert_allclose(recorded.inputs.reshape(-1, WIDTH), taken[case.keep], atol=1e-6)
        np.testing.assert_allclose(recorded.outputs.reshape(-1, WIDTH), given[case.keep], atol=1e-5)


def test_feed_forward_parts_are_distilled_in_order_each_on_the_compressed_network(case):
    before, modules = state(case.model), dict(case.model.named_modules())
    parameters = sum(p.numel() for p in case.model.parameters())
    expected = run(case.model, case.batches)
    model = case.model
    for name in case.feed_forward:
        taken, _ = recorded_by_hooks(model, name, case.batches)
        result = cvxdistill.distill(model, name, case.batches, **QUICK)
        assert result.report.block == name and result.report.examples == SEQUENCES
        assert result.report.gate_source == "teacher"
        assert result.report.parameters < result.report.block_parameters
        # The inputs of the next block are those that the students before it give.
        later, answers = recorded_by_hooks(result.model, name, case.batches)
        np.testing.assert_allclose(later, taken, atol=1e-6)
        with torch.no_grad():
            predicted = result.student(torch.from_numpy(taken)).numpy()
        np.testing.assert_allclose(answers, predicted, atol=1e-5)
        parameters += result.report.parameters - result.report.block_parameters
        model = result.model
    assert sum(tensor.numel() for tensor in model.parameters()) <= parameters
    got = run(model, case.batches)
    assert got.shape == expected.shape
    assert not torch.allclose(got, expected, atol=1e-4)
    error = (got - expected)[case.keep].norm() / expected[case.keep].norm()
    assert error < 0.7
    assert same(before, case.model) and dict(case.model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_whole_layers_are_distilled_in_order(case):
    before = state(case.model)
    model = case.model
    expected = run(model, case.batches)
    for name in case.layers:
        result = cvxdistill.distill(model, name, case.batches, **QUICK)
        assert result.report.block_parameters > 5 * result.report.parameters
        model = result.model
    assert run(model, case.batches).shape == expected.shape
    assert same(before, case.model)


def test_the_student_gives_the_convex_programmes_prediction(case, monkeypatch):
    solved = []

    class Recording(RFISTA):
        def solve(self, problem, alpha, **options):
            solved.append((problem, super().solve(problem, alpha, **options)))
            return solved[-1][1]

    monkeypatch.setattr("cvxdistill.candidates.RFISTA", Recording)
    name = case.feed_forward[0]
    recorded = capture(case.model, name, case.batches, verbose=0)
    first = get_block(case.model, name.partition(":")[0])
    G = teacher_gates(first, recorded.inputs[:8], recorded.layout())[:, :4]
    result = cvxdistill.distill(
        case.model, name, case.batches, student="gated", gates=G, alpha=1e-3, refit=False,
        n_neurons=100, tol=1e-4, max_rows=None, verbose=0,
    )  # fmt: skip
    ((problem, solution),) = solved

    # The rows that were fitted: the tokens, without padding, of sequences that were not held out.
    taken, given = recorded_by_hooks(case.model, name, case.batches)
    fitted = np.zeros_like(case.keep)
    fitted[random_order(np.random.default_rng(0), SEQUENCES)[SEQUENCES // 10 :]] = True
    fitted &= case.keep
    ones = np.ones((*taken.shape[:2], 1), np.float32)
    X = np.concatenate([taken, ones], axis=2)
    np.testing.assert_allclose(problem.operator.X[:], X[fitted], atol=1e-6)

    D = X @ np.hstack([np.zeros((WIDTH + 1, 1), np.float32), G]) >= 0
    np.testing.assert_array_equal(problem.operator.D, D[fitted])
    center = given[fitted].mean(axis=0, dtype=float)
    predicted = np.einsum("ntp,ntd,pdc->ntc", D, X, solution.V) + solution.intercept + center
    _, answers = recorded_by_hooks(result.model, name, case.batches)
    np.testing.assert_allclose(answers, predicted, atol=1e-5)


@pytest.mark.parametrize("which", ["feed_forward", "layers"])
def test_the_contents_of_padding_change_nothing(case, which):
    if case.keep.all():
        pytest.skip("images have no padding")
    other = [dict(batch) for batch in case.batches]
    for batch in other:
        noise = torch.randint(1, 50, batch["input_ids"].shape)
        padding = batch["attention_mask"] == 0
        batch["input_ids"] = torch.where(padding, noise, batch["input_ids"])
    name = getattr(case, which)[0]

    def students(**options: Any) -> list[nn.Module]:
        return [
            cvxdistill.distill(case.model, name, batches, **QUICK, **options).student
            for batches in (case.batches, other)
        ]

    one, two = students()
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)
    one, two = students(mask=None)
    assert any(
        left.shape != right.shape or not torch.allclose(left, right, atol=1e-3)
        for left, right in zip(one.parameters(), two.parameters(), strict=True)
    )


def test_one_dict_of_tensors_is_split_into_batches(case):
    whole = {
        key: torch.cat([batch[key] for batch in case.batches])
        for key in case.batches[0]
        if key != "labels"
    }
    recorded = capture(case.model, case.layers[1], whole, batch_size=30, verbose=0)
    batched = capture(case.model, case.layers[1], case.batches, verbose=0)
    np.testing.assert_allclose(recorded.inputs, batched.inputs, atol=1e-6)
    assert recorded.n_examples == SEQUENCES


def test_attention_returns_a_tuple_and_its_student_too(case):
    name = next(
        known
        for known, module in case.model.named_modules()
        if known.startswith(case.layers[1]) and known.endswith((".attention", ".attn"))
    )
    result = cvxdistill.distill(case.model, name, case.batches, **QUICK)
    with torch.no_grad():
        answer = get_block(result.model, name)(torch.zeros(2, 3, WIDTH))
        assert isinstance(answer, tuple) and answer[0].shape == (2, 3, WIDTH)
    assert run(result.model, case.batches).isfinite().all()
    again = swap_block(case.model, find_span(case.model, name, case.batches[0]), result.student)
    torch.testing.assert_close(run(again, case.batches), run(result.model, case.batches))


def test_all_layers_are_one_span(case):
    result = cvxdistill.distill(case.model, ":".join(case.layers), case.batches, **QUICK)
    assert run(result.model, case.batches).isfinite().all()
    assert not list(get_block(result.model, case.layers[1]).parameters())


def test_a_saved_student_is_put_back_into_the_teacher(case, tmp_path):
    result = cvxdistill.distill(case.model, case.feed_forward[0], case.batches, **QUICK)
    result.save(tmp_path / "student.safetensors")
    loaded = load_student(tmp_path / "student.safetensors")
    assert loaded.layout == result.student.layout
    expected = run(result.model, case.batches)
    for span in (result.span, find_span(case.model, case.feed_forward[0], case.batches[0])):
        swapped = swap_block(case.model, span, loaded)
        torch.testing.assert_close(run(swapped, case.batches), expected)
    weights = copy.deepcopy(result.model.state_dict())
    swapped.load_state_dict(weights)


def test_a_name_alone_is_enough_where_the_tree_tells_what_lies_between(case):
    result = cvxdistill.distill(case.model, case.feed_forward[0], case.batches, **QUICK)
    if result.span.between:
        with pytest.raises(ValueError, match=r"may run between .*find_span\(model, "):
            swap_block(case.model, case.feed_forward[0], result.student)
    else:
        swapped = swap_block(case.model, case.feed_forward[0], result.student)
        torch.testing.assert_close(run(swapped, case.batches), run(result.model, case.batches))


def test_polishing_works_on_tokens(case):
    options = {**QUICK, "n_neurons": 12}
    result = cvxdistill.distill(
        case.model, case.feed_forward[0], case.batches, polish="group_elastic_net", max_neurons=4,
        **options,
    )  # fmt: skip
    assert result.report.chosen.n_neurons <= 4


def test_held_out_tokens_are_those_of_whole_sequences(case):
    result = cvxdistill.distill(case.model, case.feed_forward[0], case.batches, **QUICK)
    report = result.report
    held_out = np.zeros(SEQUENCES, dtype=bool)
    held_out[random_order(np.random.default_rng(0), SEQUENCES)[: SEQUENCES // 10]] = True
    assert report.held_out == held_out.sum()
    assert report.available_rows == case.keep[~held_out].sum()
    taken, given = recorded_by_hooks(case.model, case.feed_forward[0], case.batches)
    keep = case.keep & held_out[:, None]
    with torch.no_grad():
        Z = result.student(torch.from_numpy(taken)).numpy()
    error = np.linalg.norm((Z - given)[keep]) / np.linalg.norm(given[keep])
    assert report.error == pytest.approx(error, rel=1e-4)


def test_a_layer_that_writes_to_a_cache_is_replaced_with_a_warning():
    case = gpt2()
    batches = [{**batch, "use_cache": True} for batch in case.batches]
    with pytest.warns(UserWarning, match="generate with use_cache=False"):
        capture(case.model.eval(), "h.0", batches, verbose=0)


def test_attention_weights_and_two_inputs_are_refused():
    model = bert().model
    ids = torch.ones(2, 4, dtype=torch.int64)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"must be one tensor, got tuple.*output_attentions=Fal"):
        capture(model, "encoder.layer.0.attention", [{"input_ids": ids}], verbose=0)
    with pytest.raises(ValueError, match="exactly one tensor, but was called with: Tensor, Tens"):
        capture(model, "encoder.layer.0.output", [{"input_ids": ids}], verbose=0)
    with pytest.raises(ValueError, match=r"'encoder\.layer\.0\.attention' gives is used elsewhere"):
        name = "encoder.layer.0.attention:encoder.layer.0.intermediate"
        model.set_attn_implementation("sdpa")
        capture(model, name, [{"input_ids": ids}], verbose=0)
