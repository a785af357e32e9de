"""Hadamard matrices, built by rule, and fast multiplication by them.

A Hadamard matrix of order ``n`` has entries of 1 and -1 and ``H Hᵀ = n I``. Orders come from
Paley's two constructions (quadratic residues of a finite field), from four circulant matrices in
the array of Goethals and Seidel (found by a search among sequences with multipliers), and from
Kronecker products of these with each other and with Sylvester's ``[[1, 1], [1, -1]]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qplug.errors import QplugError

Integers = NDArray[np.int64]

#: The largest order of a matrix that is no Kronecker product.
_LARGEST = 2048
#: The largest power of two in one step of a transform.
_POWER = 64
#: The largest number of free signs in sequences that the search for circulants tries.
_FREE_SIGNS = 14


def hadamard_matrix(order: int) -> Integers:
    """The Hadamard matrix of ``order``, int64 ``[order, order]``, with entries of 1 and -1.

    Raises QplugError if no rule gives one.
    """
    matrix = np.ones((1, 1), np.int64)
    for factor in factors(order):
        matrix = np.kron(matrix, _factor(factor))
    return matrix


def hadamard_transform(x: Tensor) -> Tensor:
    """``x H / sqrt(n)`` over the last axis of ``x: [..., n]``, in the dtype of ``x``.

    ``H / sqrt(n)`` is orthogonal. Raises QplugError if no rule gives a matrix of order ``n``.
    """
    order = x.shape[-1]
    y, behind = x, order
    for factor in factors(order):
        behind //= factor
        turn = torch.from_numpy(_factor(factor).T.copy()).to(x.device, x.dtype)
        # H = H_factor ⊗ H_behind: each step transforms one digit of the index.
        y = turn @ y.reshape(-1, factor, behind) if behind > 1 else y.reshape(-1, factor) @ turn.T
    return y.reshape(x.shape) / math.sqrt(order)


@cache
def factors(order: int) -> tuple[int, ...]:
    """Orders of the matrices whose Kronecker product has ``order``, non-powers of two first.

    Raises QplugError if no rule gives them.
    """
    orders = _factors(order)
    if orders is None:
        raise QplugError(f"no rule gives a Hadamard matrix of order {order}")
    return orders


def hadamard_exists(order: int) -> bool:
    """Whether ``hadamard_matrix(order)`` can be built."""
    return _factors(order) is not None


@cache
def _factors(order: int) -> tuple[int, ...] | None:
    twos = (order & -order).bit_length() - 1
    if order < 1 or (order > 2 and twos < 2):
        return None
    odd = order >> twos
    if odd == 1:
        return _powers(twos)
    for power in range(2, twos + 1):  # the smallest matrix first: it is cheapest to multiply by
        if odd << power <= _LARGEST and _rule(odd << power):
            return (odd << power, *_powers(twos - power))
    for part in range(12, math.isqrt(order) + 1, 4):
        if order % part == 0 and part & (part - 1):
            left, right = _factors(part), _factors(order // part)
            if left is not None and right is not None:
                return (*left, *right)
    return None


def _powers(twos: int) -> tuple[int, ...]:
    """Powers of two of similar size whose product is ``2 ** twos``."""
    count = -(-twos // (_POWER.bit_length() - 1))
    return tuple(2 ** ((twos + part) // count) for part in range(count))


def _rule(order: int) -> bool:
    """Whether a construction other than a Kronecker product gives ``order``."""
    return (
        (order % 4 == 0 and _prime_power(order - 1) is not None)
        or (order % 8 == 4 and _prime_power(order // 2 - 1) is not None)
        or (order % 8 == 4 and _circulants(order // 4) is not None)
    )


@cache
def _factor(order: int) -> Integers:
    """The matrix of one of ``factors``: Sylvester's, Paley's, or from four circulants."""
    if order & (order - 1) == 0:
        matrix = np.ones((1, 1), np.int64)
        while len(matrix) < order:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return matrix
    if _prime_power(order - 1) is not None:
        return _paley_one(order - 1)
    if _prime_power(order // 2 - 1) is not None:
        return _paley_two(order // 2 - 1)
    rows = _circulants(order // 4)
    assert rows is not None
    return _goethals_seidel(rows)


# --- Paley ---------------------------------------------------------------------------------------


def _paley_one(q: int) -> Integers:
    """Order ``q + 1`` for a prime power ``q = 3 mod 4``: ``I + S`` for the skew ``S`` of ``Q``."""
    skew = np.zeros((q + 1, q + 1), np.int64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(q)
    return skew + np.eye(q + 1, dtype=np.int64)


def _paley_two(q: int) -> Integers:
    """Order ``2 (q + 1)`` for ``q = 1 mod 4``, from the symmetric conference matrix of ``Q``."""
    conference = np.ones((q + 1, q + 1), np.int64)
    conference[1:, 1:] = _jacobsthal(q)
    conference[0, 0] = 0
    off_diagonal = np.array([[1, 1], [1, -1]])
    diagonal = np.array([[1, -1], [-1, -1]])
    return np.kron(conference, off_diagonal) + np.kron(np.eye(q + 1, dtype=np.int64), diagonal)


def _jacobsthal(q: int) -> Integers:
    """``Q[a, b]``: 1 if ``a - b`` is a square in the field of ``q``, -1 if not, 0 if it is zero."""
    power_of_prime = _prime_power(q)
    assert power_of_prime is not None
    prime, degree = power_of_prime
    place = prime ** np.arange(degree)
    character = np.zeros(q, np.int64)
    for power, element in enumerate(_powers_of_generator(prime, degree)):
        character[element @ place] = 1 if power % 2 == 0 else -1
    elements = np.arange(q)[:, None] // place % prime  # [q, degree]
    difference = sum((a[:, None] - a) % prime * p for a, p in zip(elements.T, place, strict=True))
    jacobsthal: Integers = character[difference]
    return jacobsthal


def _powers_of_generator(prime: int, degree: int) -> list[Integers]:
    """All non-zero elements of the field of ``prime ** degree``, as the powers of a generator.

    An element is the coefficients of a polynomial in ``x``, modulo a polynomial for which ``x`` (in
    a prime field: a number) generates the field.
    """
    size = prime**degree
    for number in range(1, size):
        # The polynomial that x ** degree is equal to.
        rest = number // prime ** np.arange(degree) % prime
        element = np.zeros(degree, np.int64)
        element[0] = 1
        powers = [element]
        while len(powers) < size:
            carry = element[-1]
            element = (np.concatenate([[0], element[:-1]]) + carry * rest) % prime
            if (element == powers[0]).all() or not element.any():
                break
            powers.append(element)
        if len(powers) == size - 1:
            return powers
    raise AssertionError(f"{size} is no prime power")


@cache
def _prime_power(number: int) -> tuple[int, int] | None:
    """``(p, k)`` if ``number`` is ``p ** k`` for an odd prime ``p``, else None."""
    if number < 3 or number % 2 == 0:
        return None
    prime = next((p for p in range(3, math.isqrt(number) + 1, 2) if number % p == 0), number)
    degree = 0
    while number % prime == 0:
        number, degree = number // prime, degree + 1
    return (prime, degree) if number == 1 else None


# --- four circulants -----------------------------------------------------------------------------


def _goethals_seidel(rows: Integers) -> Integers:
    """The matrix of order ``4 n`` from circulants with ``Σ AAᵀ = 4 n I``.

    ``rows: [4, n]``: the first row of each circulant.
    """
    length = rows.shape[1]
    index = (np.arange(length) - np.arange(length)[:, None]) % length
    back = np.eye(length, dtype=np.int64)[::-1]
    a, b, c, d = (row[index] for row in rows)
    b_back, c_back, d_back = b @ back, c @ back, d @ back
    b_turned, c_turned, d_turned = b.T @ back, c.T @ back, d.T @ back
    return np.block(
        [
            [a, b_back, c_back, d_back],
            [-b_back, a, d_turned, -c_turned],
            [-c_back, -d_turned, a, b_turned],
            [-d_back, c_turned, -b_turned, a],
        ]
    )


@cache
def _circulants(length: int) -> Integers | None:
    """Four sequences of 1 and -1 whose periodic autocorrelations sum to zero, ``[4, length]``.

    The search covers sequences that stay the same when their indices are multiplied by a group of
    units modulo ``length``; it takes larger groups first, which leave fewer free signs. None if it
    finds no four sequences.
    """
    if length > _LARGEST // 4 or length % 2 == 0:
        return None
    for orbits in _orbit_sets(length):
        if len(orbits) > _FREE_SIGNS:
            break
        rows = _four_of(_sequences(length, orbits), [orbit[0] for orbit in orbits])
        if rows is not None:
            return rows
    return None


def _orbit_sets(length: int) -> list[list[list[int]]]:
    """The orbits of ``1 .. length - 1`` under groups of units, fewest orbits first."""
    groups: set[frozenset[int]] = set()
    for unit in range(1, length):
        if math.gcd(unit, length) == 1:
            members, power = {1}, unit
            while power != 1:
                members.add(power)
                power = power * unit % length
            groups |= {frozenset(members), frozenset(members | {-m % length for m in members})}
    orbit_sets = []
    for group in sorted(groups, key=lambda group: (-len(group), sorted(group))):
        left, orbits = set(range(1, length)), []
        while left:
            orbit = sorted({min(left) * unit % length for unit in group})
            left -= set(orbit)
            orbits.append(orbit)
        orbit_sets.append(orbits)
    return sorted(orbit_sets, key=len)


def _sequences(length: int, orbits: list[list[int]]) -> Integers:
    """All sequences that are 1 at index 0 and constant on orbits, ``[2 ** orbits, length]``."""
    count = len(orbits)
    signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    sequences = np.ones((2**count, length), np.int64)
    for column, orbit in enumerate(orbits):
        sequences[:, orbit] = signs[:, [column]]
    return sequences


def _four_of(sequences: Integers, shifts: list[int]) -> Integers | None:
    """Four rows whose autocorrelations at ``shifts`` sum to zero, or None; meets in the middle."""
    length = sequences.shape[1]
    spectra = np.abs(np.fft.rfft(sequences, axis=1)) ** 2
    # The four spectra sum to 4 n at every frequency, and none is negative.
    fits = (spectra <= 4 * length + 1e-6).all(1)
    correlations = np.rint(np.fft.irfft(spectra[fits], n=length, axis=1)).astype(np.int64)
    correlations, first = np.unique(correlations[:, shifts], axis=0, return_index=True)
    sequences = sequences[fits][first]
    # One random number for each autocorrelation, so that sums are compared as numbers.
    weights = np.random.default_rng(0).integers(1, 2**40, len(shifts))
    marks = correlations @ weights
    squares = sequences.sum(1) ** 2
    kinds = {int(square): np.flatnonzero(squares == square) for square in np.unique(squares)}
    for a, b, c, d in combinations_with_replacement(sorted(kinds), 4):
        if a + b + c + d == 4 * length:
            outer = (marks[kinds[a]][:, None] + marks[kinds[d]]).ravel()
            inner = -(marks[kinds[b]][:, None] + marks[kinds[c]]).ravel()
            for left, right in _meetings(outer, inner):
                i, j = divmod(left, len(kinds[d]))
                k, m = divmod(right, len(kinds[c]))
                rows = [kinds[a][i], kinds[b][k], kinds[c][m], kinds[d][j]]
                if not correlations[rows].sum(0).any():
                    return sequences[rows]
    return None


def _meetings(outer: Integers, inner: Integers) -> Iterator[tuple[int, int]]:
    """Yields indices of equal numbers in ``outer`` and ``inner``."""
    order = np.argsort(inner, kind="stable")
    at = np.searchsorted(inner[order], outer).clip(max=len(inner) - 1)
    for index in np.flatnonzero(inner[order[at]] == outer):
        yield int(index), int(order[at[index]])
