"""Fixed level sets: sorted reals in [-1, 1] that a learned clip stretches.

Notation: b bits, n = 2^(b-1), r = `base` (2 or sqrt 2), L = number of levels.

    symmetric  {0} u {+-r^-i, i = 0..n-2}              L = 2^b - 1   one code unused
    full       symmetric u {-r^-(n-1)}                 L = 2^b       one more small negative level
    no_zero    {+-r^-i, i = 0..n-1}                    L = 2^b
    released   {0} u {+-r^-i, i = 0..n-1}              L = 2^b + 1   does NOT fit b bits
    additive   signed sums of powers of two (APoT)     L = 2^b - 1
    sums       sums of powers of two (APoT's inputs)   L = 2^b
    powers     {0} u {2^-i, i = 0..2^b-2} (POT's)      L = 2^b

`full` and `no_zero` are ours: two ways to use the code that `symmetric` leaves idle. What they are
worth, as relative squared error at the best clip (E (x_hat - x)^2 / E x^2), on a normal and a
Laplace density and on the 18 inner convolutions of a float CIFAR-10 ResNet-20 (one clip per output
channel, 120 clips searched):

                        N(0,1)                  Laplace                 ResNet-20 weights
    b               2      3      4         2      3      4         2      3      4
    symmetric 2     .1901  .0475  .0377     .2640  .0704  .0382     .2084  .0509  .0336
    full 2          .1464  .0440  .0377     .2096  .0605  .0382     .1563  .0450  .0336
    no_zero 2       .1581  .0441  .0377     .2714  .0659  .0382     .1915  .0484  .0336
    symmetric sqrt2 .1901  .0684  .0130     .2640  .1216  .0222     .2084  .0812  .0134
    full sqrt2      .1574  .0555  .0121     .2270  .1021  .0194     .1706  .0652  .0120
    no_zero sqrt2   .2420  .0875  .0141     .3757  .1774  .0279     .2814  .1140  .0169
    released 2      .0821  .0398  .0377     .1328  .0473  .0381     .0940  .0376  .0336
    released sqrt2  .1163  .0400  .0112     .1826  .0788  .0162     .1326  .0488  .0106
    additive        .1901  .0475  .0121     .2640  .0704  .0202     .2084  .0509  .0126
    uniform 2^b     .1494  .0406  .0118     .2068  .0718  .0250     .1662  .0489  .0143

Of the legal power grids `full` has the least error at every width, with base 2 up to 3 bits and
sqrt 2 from 4 bits on: the defaults of POST. Squared error of weights is not task accuracy.

All are computed in float64 and stored as float32. Base 2 at 8 bits ends at 2^-126 (symmetric), the
smallest normal float32, or 2^-127 (others), a subnormal: every level is a distinct float32, though
the smallest are of no use. More than 8 bits would underflow and is refused.

Sources: powers of two and their sums, Li, Dong, Wang, ICLR 2020, arXiv 1909.13144 and its code;
base sqrt 2, Zhou et al., arXiv 2504.17263 and its code.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

SQRT2 = 2**0.5
MAX_BITS = 8


def check_bits(name: str, bits: int) -> None:
    """Raise unless `name` defines a grid of this width (2 to 8 bits)."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= MAX_BITS:
        raise ValueError(f"{name} is defined for bits from 2 to {MAX_BITS}, got {bits!r}")


def _signed(magnitudes: list[float], *, zero: bool) -> Tensor:
    positive = sorted(set(magnitudes))
    values = [-m for m in reversed(positive)] + ([0.0] if zero else []) + positive
    return torch.tensor(values, dtype=torch.float64).float()


def symmetric(bits: int, base: float) -> Tensor:
    """{0} u {+-base^-i, i = 0..2^(b-1)-2}: [2^b - 1] levels."""
    return _signed([base**-i for i in range(2 ** (bits - 1) - 1)], zero=True)


def full(bits: int, base: float) -> Tensor:
    """`symmetric` and one more small negative level: [2^b] levels, zero among them."""
    grid = symmetric(bits, base)
    extra = torch.tensor([-(base ** -(2 ** (bits - 1) - 1))], dtype=torch.float64).float()
    below = 2 ** (bits - 1) - 1  # levels under zero
    return torch.cat([grid[:below], extra, grid[below:]])


def no_zero(bits: int, base: float) -> Tensor:
    """{+-base^-i, i = 0..2^(b-1)-1}: [2^b] levels without zero."""
    return _signed([base**-i for i in range(2 ** (bits - 1))], zero=False)


def released(bits: int, base: float) -> Tensor:
    """{0} u {+-base^-i, i = 0..2^(b-1)-1}: [2^b + 1] levels, as ASQ's code builds them."""
    return _signed([base**-i for i in range(2 ** (bits - 1))], zero=True)


def additive(bits: int) -> Tensor:
    """Signed sums of powers of two with b - 1 bits of magnitude: [2^b - 1] levels (APoT)."""
    return _signed(_sums(bits - 1)[1:], zero=True)


def sums(bits: int) -> Tensor:
    """Sums of powers of two, from 0 to 1: [2^b] levels (APoT's activations)."""
    return torch.tensor(_sums(bits), dtype=torch.float64).float()


def powers(bits: int) -> Tensor:
    """{0} u {2^-i, i = 0..2^b-2}: [2^b] levels (POT's activations).

    Raises:
        ValueError: more than 7 bits, where the smallest would underflow.
    """
    if bits > 7:
        raise ValueError(f"powers of two of inputs are defined for bits up to 7, got {bits}")
    return torch.tensor([0.0, *(2.0**-i for i in reversed(range(2**bits - 1)))])


def _sums(bits: int) -> list[float]:
    """Sums of powers of two of B = `bits` bits, ascending from 0, normalised to 1: 2^B of them.

    B bits are m = B // 2 terms of {0, three powers}, and, if B is odd, one term of {0, one power}.
    Powers 2^-1, 2^-2, ... are dealt to the terms in three rounds, the single one before the last
    round. For B = 2..6 these are the sets the authors' code lists; B = 1 gives {0, 1}, its ternary
    2-bit case; B = 7 and 8 continue the rule and are ours.
    """
    terms: list[list[float]] = [[0.0] for _ in range(bits // 2)]
    single = [0.0]
    exponent = 0
    for turn in range(3):
        if turn == 2 and bits % 2 == 1:
            exponent += 1
            single.append(2.0**-exponent)
        for term in terms:
            exponent += 1
            term.append(2.0**-exponent)
    found = [sum(choice) for choice in product(*terms, single)]
    return sorted(s / max(found) for s in found)
