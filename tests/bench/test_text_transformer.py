"""The benchmark of feed-forward parts, small: its text, its sizes, and students of a tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas", "torch", "transformers"):
    pytest.importorskip(package)

import text_corpus  # noqa: E402
import text_transformer as bench  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402


@pytest.fixture(scope="module")
def text():
    whole = bench.load_text(vocabulary=60, length=12, most_files=20)
    # Sorted by length: some of each.
    parts = (part[:: max(1, len(part) // 30)] for part in (whole.train, whole.test))
    return bench.Text(whole.vocabulary, *parts)


@pytest.fixture(scope="module")
def teacher(text):
    model = bench.untrained(len(text.vocabulary.words), width=16, layers=2)
    bench.train(model, text.train, epochs=1)
    # Parts that bend their inputs and matter.
    for name, parameter in model.named_parameters():
        if ".mlp." in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return bench.Teacher.of(model.eval(), text.test)


def test_docstrings_are_split_by_file_and_test_files_tell_nothing_known(tmp_path):
    for number in range(20):
        (tmp_path / f"m{number:02}.py").write_text(
            f'"""Module {number}."""\n\n\nclass A:\n    """Said twice."""\n\n'
            f'    async def f(self):\n        """Method {number}."""\n\n\ndef g():\n    return ""\n'
        )
    (tmp_path / "m00.py").write_text("print 'not Python 3'")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('"""Left out."""')
    train, test = text_corpus.split_docstrings(tmp_path)
    assert test == ["Module 9.", "Method 9.", "Module 19.", "Method 19."]
    assert train[:3] == ["Module 1.", "Said twice.", "Method 1."] and len(train) == 17 * 3
    assert (train, test) == text_corpus.split_docstrings(tmp_path)


def test_words_become_numbers_by_frequency_and_batches_are_padded_on_the_right():
    texts = ["b a b", "c b a, z2"]
    vocabulary = text_corpus.Vocabulary.of(texts, 6)
    assert vocabulary.words == ("<pad>", "<start>", "<unknown>", "b", "a", ",")
    sequences = vocabulary.sequences([*texts, "b"], length=5)
    # Pieces of four words; one word alone is left out.
    assert sequences == [[1, 3, 4, 3], [1, 2, 3, 4, 5], [1, 2, 2]]
    ((batch),) = text_corpus.batches(sequences, 8)
    assert batch["input_ids"].tolist() == [[1, 2, 2, 0, 0], [1, 3, 4, 3, 0], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 4, 5]


def test_training_beats_word_frequencies(text):
    model = bench.untrained(len(text.vocabulary.words), width=16, layers=1)
    teacher = bench.Teacher.of(model, text.test)
    before = teacher.compare(model)
    words = len(text.vocabulary.words)
    assert before["cosine"] == pytest.approx(1) and before["error"] == 0
    assert before["perplexity"] == pytest.approx(words, rel=0.1)
    after = teacher.compare(bench.train(model, text.train, epochs=4))
    assert after["perplexity"] < bench.unigram(text)["perplexity"] < words
    assert after["error"] > 0.1 and after["cosine"] < 0.99


def test_measures_leave_padding_out(teacher):
    other = []
    for batch in teacher.test:
        noise = torch.randint(1, 50, batch["input_ids"].shape)
        padding = batch["attention_mask"] == 0
        other.append({**batch, "input_ids": torch.where(padding, noise, batch["input_ids"])})
    assert any((batch["attention_mask"] == 0).any() for batch in teacher.test)
    changed = bench.without_parts(teacher.model)
    measured = teacher.compare(changed)
    with_noise = bench.Teacher(teacher.model, other, teacher.hidden).compare(changed)
    assert with_noise == pytest.approx(measured, rel=1e-5)
    assert measured["error"] > 0.1


def test_perplexity_is_that_of_the_models_own_loss(teacher, text):
    # transformers' loss of one sequence without padding.
    batch = {key: value[-1:] for key, value in text.test[-1].items()}
    assert batch["attention_mask"].all()
    with torch.no_grad():
        loss = teacher.model(**batch, labels=batch["input_ids"]).loss
    measured = bench.Teacher.of(teacher.model, [batch]).compare(teacher.model)
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("method", bench.METHODS)
def test_every_part_is_replaced_within_its_numbers(teacher, text, method, monkeypatch):
    monkeypatch.setattr(bench, "MAX_ROWS", 2000)
    before = bench.stored(teacher.model)
    nothing = teacher.compare(bench.without_parts(teacher.model))
    layers = teacher.model.transformer.h
    of_parts = sum(p.numel() for layer in layers for p in layer.mlp.parameters())
    size = 1.0 if method == "linear" else 3.0
    chosen = bench.student_size(method, size, 16)
    model = bench.distilled(teacher.model, text.train, **bench.METHODS[method], **chosen)
    for layer in model.transformer.h:
        student = layer.mlp
        assert student.parameters_stored <= size * 17 * 16
        assert (student.n_gates > 0) == (method != "linear")
    measured = teacher.compare(model)
    within = before - of_parts + 2 * size * 17 * 16
    assert before - of_parts < measured["parameters"] <= within
    assert measured["error"] < nothing["error"] and measured["cosine"] > nothing["cosine"]
    assert measured["cosine"] < 1 and np.isfinite(measured["perplexity"])


def test_compress_keeps_a_budget_of_feed_forward_parts(teacher, text):
    budget = bench.stored(teacher.model) - 1500
    found = cvxdistill.compress(
        teacher.model, text.train, max_parameters=budget, blocks=bench.parts(teacher.model),
        verbose=0,
    )  # fmt: skip
    assert bench.stored(found.model) <= budget
    assert teacher.compare(found.model)["cosine"] > 0.5
