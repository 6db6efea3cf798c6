"""What torch's generator on a CPU draws after each of many seeds, all at once."""

import numpy as np

_STATE, _AHEAD = 624, 397  # words of the state, and between two that make a new one
MOST = _STATE - _AHEAD  # words that only the seeded state is needed for


def words(seeds: np.ndarray, count: int) -> np.ndarray:
    """The first words after torch.manual_seed of each seed: uint32 (count, N), at most MOST.

    seeds: int64 (N,). Source: Matsumoto & Nishimura 1998 (MT19937), as in torch's
    MT19937RNGEngine.h, which seeds it with the lower 32 bits.
    """
    assert count <= MOST
    state: np.ndarray = (seeds & 0xFFFFFFFF).astype(np.uint32)
    early, late = [state], []
    for place in range(1, _AHEAD + count):
        state = (state ^ (state >> 30)) * np.uint32(1812433253) + np.uint32(place)
        if place <= count:
            early.append(state)
        if place >= _AHEAD:
            late.append(state)
    first = np.stack(early)
    mixed = (first[:-1] & np.uint32(0x80000000)) | (first[1:] & np.uint32(0x7FFFFFFF))
    drawn: np.ndarray = np.stack(late) ^ (mixed >> 1) ^ (mixed & 1) * np.uint32(0x9908B0DF)
    drawn ^= drawn >> 11
    drawn ^= (drawn << 7) & np.uint32(0x9D2C5680)
    drawn ^= (drawn << 15) & np.uint32(0xEFC60000)
    drawn ^= drawn >> 18
    return drawn


def uniform(drawn: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32, what Tensor.uniform_(low, high) makes of each word."""
    start = np.float32(low)
    width = np.float32(high) - start
    # multiplied and added with one rounding, as processors have it for more than ten years
    shares = (drawn & 0xFFFFFF).astype(np.float64) * 2.0**-24
    return (shares * width + np.float64(start)).astype(np.float32)
