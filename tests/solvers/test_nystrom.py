"""Nystrom approximations and preconditioned conjugate gradients against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers.nystrom import conjugate_gradients, nystrom_approximation


def matrix_with(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    return (Q * eigenvalues) @ Q.T


def counted(A):
    """The product with A, and a list that grows with every call."""
    calls = []

    def product(B):
        calls.append(B.shape)
        return A @ B

    return product, calls


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 12), size=st.integers(2, 30))
def test_approximation_lies_below_the_matrix_and_its_basis_is_orthonormal(seed, rank, size):
    A = matrix_with(np.random.default_rng(seed).exponential(size=size), seed)
    approximation = nystrom_approximation(lambda B: A @ B, size, rank, random_state=seed)
    U, eigenvalues = approximation.U, approximation.eigenvalues
    assert U.shape == (size, min(rank, size))
    np.testing.assert_allclose(U.T @ U, np.eye(len(eigenvalues)), atol=1e-10)
    assert (np.diff(eigenvalues) <= 0).all() and (eigenvalues >= 0).all()
    left = np.linalg.eigvalsh(A - (U * eigenvalues) @ U.T)
    assert left.min() >= -1e-8 * np.linalg.norm(A, 2)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_matrix_of_low_rank_is_found_exactly(scale):
    spectrum = scale * np.array([5.0, 3.0, 1.0, 0.5] + [0.0] * 21)
    A = matrix_with(spectrum)
    approximation = nystrom_approximation(lambda B: A @ B, 25, 8)
    found = (approximation.U * approximation.eigenvalues) @ approximation.U.T
    np.testing.assert_allclose(found, A, atol=1e-6 * scale)
    np.testing.assert_allclose(approximation.eigenvalues[:4], spectrum[:4], rtol=1e-6)


def test_same_seed_gives_the_same_approximation():
    A = matrix_with(np.linspace(0, 1, 20))
    one, same, other = (nystrom_approximation(lambda B: A @ B, 20, 5, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.U, same.U)
    assert not np.allclose(one.U, other.U)


@pytest.mark.parametrize("mu", [1e-3, 0.1])
def test_precondition_is_the_inverse_that_the_docstring_writes(mu):
    A = matrix_with(1.0 / np.arange(1, 31) ** 2)
    approximation = nystrom_approximation(lambda B: A @ B, 30, 7)
    U, eigenvalues = approximation.U, approximation.eigenvalues
    P = (U * (eigenvalues + mu)) @ U.T / (eigenvalues[-1] + mu) + np.eye(30) - U @ U.T
    B = np.random.default_rng(0).standard_normal((30, 3))
    np.testing.assert_allclose(approximation.precondition(B, mu), np.linalg.solve(P, B), rtol=1e-8)


@pytest.mark.parametrize("mu", [1e-4, 1e-2])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_condition_number_is_within_the_bound_of_the_paper(mu, power):
    """Frangella, Tropp and Udell 2023, proposition 5.3: (lambda_rank + mu + ||A - A_hat||) / mu."""
    size, rank = 80, 20
    A = matrix_with(1.0 / np.arange(1, size + 1.0) ** power)
    approximation = nystrom_approximation(lambda B: A @ B, size, rank)
    U, eigenvalues = approximation.U, approximation.eigenvalues
    error = np.linalg.norm(A - (U * eigenvalues) @ U.T, 2)
    preconditioned = approximation.precondition(A + mu * np.eye(size), mu)
    spectrum = np.sort(np.linalg.eigvals(preconditioned).real)
    condition = spectrum[-1] / spectrum[0]
    assert condition <= (1 + 1e-8) * (eigenvalues[-1] + mu + error) / mu
    assert condition < (1 + mu) / (1.0 / size**power + mu) / 3


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 25), columns=st.integers(1, 4))
def test_conjugate_gradients_solve_every_column(seed, size, columns):
    rng = np.random.default_rng(seed)
    A = matrix_with(rng.uniform(0.5, 50, size), seed)
    B = rng.standard_normal((size, columns)) * 10.0 ** rng.integers(-6, 6, columns)
    X = conjugate_gradients(lambda X: A @ X, B, lambda R: R / 3, 1e-12)
    residual = np.linalg.norm(B - A @ X, axis=0) / np.linalg.norm(B, axis=0)
    assert residual.max() <= 1e-10
    exact = np.linalg.solve(A, B)
    assert (np.linalg.norm(X - exact, axis=0) <= 1e-8 * np.linalg.norm(exact, axis=0)).all()


def test_preconditioner_saves_products():
    A = matrix_with(np.concatenate([np.geomspace(1e4, 1, 15), np.full(185, 1e-6)]))
    mu, B = 1e-3, np.random.default_rng(0).standard_normal((200, 1))
    shifted = A + mu * np.eye(200)
    approximation = nystrom_approximation(lambda B: A @ B, 200, 25)
    plain, without = counted(shifted)
    conjugate_gradients(plain, B, lambda R: R, 1e-8)
    helped, within = counted(shifted)
    X = conjugate_gradients(helped, B, lambda R: approximation.precondition(R, mu), 1e-8)
    assert len(within) < 10 < 30 < len(without)
    np.testing.assert_allclose(X, np.linalg.solve(shifted, B), rtol=1e-5)


def test_iterations_end_at_the_tolerance_and_at_the_limit():
    A = matrix_with(np.geomspace(1, 1e6, 60))
    B = np.random.default_rng(0).standard_normal((60, 2))
    lengths = np.linalg.norm(B, axis=0)
    calls = []
    for tolerance in (0.5, 1e-4):
        product, made = counted(A)
        X = conjugate_gradients(product, B, lambda R: R, tolerance)
        assert (np.linalg.norm(B - A @ X, axis=0) <= 1.01 * tolerance * lengths).all()
        calls.append(len(made))
    assert calls[0] < calls[1]
    product, made = counted(A)
    conjugate_gradients(product, B, lambda R: R, 1e-12, max_iter=3)
    assert len(made) == 3


def test_a_column_of_zeros_stays_zero():
    A = matrix_with(np.arange(1.0, 9.0))
    B = np.zeros((8, 2))
    B[:, 1] = 1
    X = conjugate_gradients(lambda X: A @ X, B, lambda R: R, 1e-10)
    assert not X[:, 0].any()
    np.testing.assert_allclose(X[:, 1], np.linalg.solve(A, B[:, 1]), rtol=1e-8)
