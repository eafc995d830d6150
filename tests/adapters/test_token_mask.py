from __future__ import annotations

import tempfile
from collections import UserDict

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cvxdistill.adapters import DenseLayout, build_student, capture  # noqa: E402


class Tokens(nn.Module):
    """Token ids (N, T) in, hidden states (N, T, 4) through a block, pooled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 4)
        self.block = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.pooler = nn.Linear(3, 2)

    def forward(self, input_ids, attention_mask=None, keep=None, use_cache=True):
        hidden = self.block(self.embedding(input_ids))
        return self.pooler(hidden.mean(dim=1))


IDS = torch.randint(0, 20, (7, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(7, 5, dtype=torch.int64)
MASK[1, 3:] = 0
MASK[4, :] = 0
MASK[6, :2] = 0
BATCHES = [
    {"input_ids": IDS[:3], "attention_mask": MASK[:3], "labels": IDS[:3, 0]},
    {"input_ids": IDS[3:], "attention_mask": MASK[3:], "use_cache": False},
]
MODEL = Tokens()
with torch.no_grad():
    HIDDEN = MODEL.embedding(IDS).numpy()
    OUTPUT = MODEL.block(MODEL.embedding(IDS)).numpy()
KEPT = MASK.numpy() != 0


def check(recorded):
    np.testing.assert_allclose(recorded.inputs, HIDDEN[KEPT], atol=1e-6)
    np.testing.assert_allclose(recorded.outputs, OUTPUT[KEPT], atol=1e-6)
    np.testing.assert_array_equal(recorded.tokens, MASK.sum(dim=1).numpy())
    assert recorded.n_examples == 7 and len(recorded) == int(MASK.sum())
    assert recorded.layout() == DenseLayout((4,), (3,), per_position=True)


WITH_KEEP = [{"input_ids": b["input_ids"], "keep": b["attention_mask"]} for b in BATCHES]
WHOLE = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.zeros(2), "use_cache": False}


@pytest.mark.parametrize(
    ("data", "mask"),
    [
        (BATCHES, "auto"),
        ([UserDict(batch) for batch in BATCHES], "auto"),
        (WHOLE, "auto"),
        ({"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()}, "auto"),
        (WITH_KEEP, "keep"),
        (BATCHES, lambda batch: batch["attention_mask"] > 0),
        (BATCHES, lambda batch: batch["attention_mask"].numpy() * 2.5),
        (IDS, MASK),
        (IDS, MASK.numpy().astype(bool)),
        (IDS.numpy(), MASK.float()),
        ({"input_ids": IDS}, MASK),
        ([IDS[:3], IDS[3:]], lambda batch: MASK[:3] if len(batch) == 3 else MASK[3:]),
    ],
)
def test_tokens_that_the_mask_leaves_out_are_not_recorded(data, mask):
    check(capture(MODEL, "block", data, mask=mask, batch_size=3, verbose=0))


def test_on_disk_and_in_memory_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with capture(MODEL, "block", BATCHES, memory_limit=0, verbose=0) as recorded:
        assert recorded.on_disk
        check(recorded)


@pytest.mark.parametrize("mask", [None, False])
def test_without_a_mask_every_token_is_recorded(mask):
    recorded = capture(MODEL, "block", BATCHES, mask=mask, verbose=0)
    np.testing.assert_allclose(recorded.inputs, HIDDEN, atol=1e-6)
    assert recorded.tokens is None and recorded.n_examples == len(recorded) == 7
    assert recorded.layout() == DenseLayout((5, 4), (5, 3), per_position=True)


def test_max_examples_counts_sequences():
    recorded = capture(MODEL, "block", BATCHES, max_examples=5, verbose=0)
    np.testing.assert_array_equal(recorded.tokens, MASK[:5].sum(dim=1).numpy())
    np.testing.assert_allclose(recorded.inputs, HIDDEN[:5][KEPT[:5]], atol=1e-6)


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_sequences_of_different_lengths_become_rows_of_tokens(memory_limit):
    batches = [IDS[:2], IDS[2:4], IDS[4:, :3], {"input_ids": IDS[:1, :2]}]
    recorded = capture(MODEL, "block", batches, memory_limit=memory_limit, verbose=0)
    np.testing.assert_array_equal(recorded.tokens, [5, 5, 5, 5, 3, 3, 3, 2])
    expected = [HIDDEN[:4].reshape(-1, 4), HIDDEN[4:, :3].reshape(-1, 4), HIDDEN[0, :2]]
    np.testing.assert_allclose(recorded.inputs, np.concatenate(expected), atol=1e-6)
    assert recorded.n_examples == 8


def test_padding_may_hold_anything_and_a_batch_of_nothing_else_is_nothing():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Identity()

        def forward(self, x, attention_mask):
            return self.block(x.masked_fill(attention_mask[..., None] == 0, float("nan")))

    x = torch.ones(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    batches = [{"x": x, "attention_mask": mask}, {"x": x, "attention_mask": 0 * mask}]
    assert capture(Bad(), "block", batches, verbose=0).inputs.shape == (2, 4)
    with pytest.raises(ValueError, match="NaN or infinity in batch 0"):
        capture(Bad(), "block", batches, mask=None, verbose=0)
    with pytest.raises(ValueError, match="the mask keeps no token"):
        capture(Bad(), "block", batches[1:], verbose=0)


def test_auto_leaves_blocks_alone_that_do_not_work_token_by_token():
    recorded = capture(MODEL, "pooler", BATCHES, verbose=0)
    assert recorded.inputs.shape == (7, 3) and recorded.tokens is None


def test_a_student_of_tokens_takes_any_number_of_axes():
    layout = capture(MODEL, "block", BATCHES, verbose=0).layout()
    rng = np.random.default_rng(0)
    G = rng.standard_normal((5, 2)).astype(np.float32)
    W1, W2 = rng.standard_normal((5, 4)), rng.standard_normal((4, 3))
    student = build_student(layout, W1, W2, np.array([0, 1, 1, 0]), G, np.zeros(3))
    hidden = torch.from_numpy(HIDDEN)
    with torch.no_grad():
        assert student(hidden).shape == (7, 5, 3)
        torch.testing.assert_close(student(hidden)[2, 3], student(hidden[2, 3]))
        torch.testing.assert_close(student(hidden)[2], student(hidden[2]))


BAD = {
    "length": (IDS, MASK[:4], ValueError, r"mask must have shape \(7, T\).*got \(4, 5\)"),
    "axes": (IDS, MASK[0], ValueError, r"mask must have shape \(7, T\).*got \(5,\)"),
    "tokens": (
        IDS, MASK[:, :3], ValueError, r"mask of batch 0 has shape \(7, 3\).*takes \(7, 5\)",
    ),
    "batches": (BATCHES, MASK, ValueError, "mask as one array is for data that is one tensor"),
    "key": (BATCHES, "kep", ValueError, r"'kep', but batch 0 has the keys \['input_ids', 'att"),
    "key of data": (WHOLE, "kep", ValueError, "'kep', but data has"),
    "no keys": ([IDS], "keep", ValueError, "'keep', but batch 0 has no keys"),
    "kind": (BATCHES, 3, TypeError, "mask must be 'auto', None, a key .* got 3"),
    "true": (BATCHES, True, TypeError, "mask must be 'auto', None, a key .* got True"),
    "additive": (
        BATCHES, lambda b: (b["attention_mask"] - 1.0) * 1e9, ValueError, "1 for tokens to keep",
    ),
    "infinite": (
        BATCHES, lambda b: b["attention_mask"].float().log(), ValueError, "1 for tokens to keep",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_masks_are_refused(case):
    data, mask, error, message = case
    with pytest.raises(error, match=message):
        capture(MODEL, "block", data, mask=mask, verbose=0)


def test_a_mask_for_a_block_that_is_not_per_token_is_refused():
    with pytest.raises(ValueError, match="does not work token by token"):
        capture(MODEL, "pooler", IDS, mask=MASK, verbose=0)
