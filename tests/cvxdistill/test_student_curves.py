"""Weightings: what counts for the same, in few outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from cvxdistill.student_curves import Weighting  # noqa: E402


@settings(max_examples=50)
@given(
    c=st.integers(2, 30),
    share=st.floats(0.05, 0.5),
    pooled=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_few_outputs_carry_what_the_head_reads(c, share, pooled, seed):
    rng = np.random.default_rng(seed)
    s = max(1, int(share * c))
    head = rng.standard_normal((c, s)) * np.geomspace(1, 0.1, s)
    weighting = Weighting.of_few(head @ head.T)
    assert weighting is not None and weighting.written is not None
    assert weighting.root.shape == (c, s) and len(set(weighting.written)) == s
    y = torch.from_numpy(rng.standard_normal((3, c, 2, 2)))
    rewritten = (
        (
            weighting
            if not pooled
            else Weighting(weighting.root, weighting.inverse, weighting.written, True)
        )
        .rewritten(y)
        .numpy()
    )
    assert not np.delete(rewritten, weighting.written, axis=1).any()
    read = np.einsum("ncij,ck->nkij", rewritten, head)
    wanted = np.einsum("ncij,ck->nkij", y.numpy(), head)
    if pooled:
        assert np.ptp(rewritten, axis=(2, 3)).max() < 1e-12
        wanted = np.broadcast_to(wanted.mean(axis=(2, 3), keepdims=True), wanted.shape)
    np.testing.assert_allclose(read, wanted, atol=1e-7 * np.abs(wanted).max())
    # The errors that its root measures are those of what the head reads.
    e = rng.standard_normal((1, c))
    size = np.linalg.norm(e @ head) / np.linalg.norm(e @ weighting.root)
    other = rng.standard_normal((1, c))
    assert np.linalg.norm(other @ head) == pytest.approx(
        size * np.linalg.norm(other @ weighting.root), rel=1e-6
    )


def test_a_head_that_reads_most_outputs_leaves_none_out():
    rng = np.random.default_rng(0)
    head = rng.standard_normal((8, 5))
    assert Weighting.of_few(head @ head.T) is None
    assert Weighting.of_few(np.zeros((8, 8))) is None
    assert Weighting.of(np.zeros((8, 8))) is None


@pytest.mark.parametrize("few", [True, False])
def test_tokens_and_images_are_rewritten_alike(few):
    rng = np.random.default_rng(0)
    head = rng.standard_normal((6, 2))
    weighting = Weighting.of_few(head @ head.T) if few else Weighting.of(head @ head.T)
    assert weighting is not None
    y = torch.from_numpy(rng.standard_normal((3, 6, 4)))
    tokens = weighting.rewritten(y.movedim(1, 2)).movedim(2, 1)
    torch.testing.assert_close(weighting.rewritten(y[..., None])[..., 0], tokens)
