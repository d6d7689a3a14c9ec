"""Threefry-2x32-20 in torch: the bits of `tessera_shared.randomness`, on any device.

torch has few operations on uint32, so a word is an int64 that is masked to its low 32 bits after every sum and shift.
A NumPy key gives results on the CPU, a tensor key on its own device.
"""

import numpy as np
import torch
from torch import Tensor

from tessera_shared.errors import SpecError
from tessera_shared.randomness import PARITY, ROTATIONS, ROUNDS, check_counters

_MASK = 0xFFFFFFFF


def threefry_2x32(key_2: Tensor | np.ndarray, counters_X2: Tensor | np.ndarray) -> Tensor:
    """Encrypt counters: int64 words in [0, 2**32). See the shared function for the rounds."""
    key_2 = _words(key_2)
    counters_X2 = _words(counters_X2).to(key_2.device)
    words = [key_2[0], key_2[1], key_2[0] ^ key_2[1] ^ PARITY]
    first, second = (counters_X2[..., 0] + words[0]) & _MASK, (counters_X2[..., 1] + words[1]) & _MASK
    for round_index in range(ROUNDS):
        rotation = ROTATIONS[round_index % 8]
        first = (first + second) & _MASK
        second = (((second << rotation) & _MASK) | (second >> (32 - rotation))) ^ first
        if round_index % 4 == 3:
            injection = round_index // 4 + 1
            first = (first + words[injection % 3]) & _MASK
            second = (second + words[(injection + 1) % 3] + injection) & _MASK
    return torch.stack([first, second], dim=-1)


def random_bits(key_2: Tensor | np.ndarray, start: int, count: int) -> Tensor:
    """Return two random 32-bit words for each of `count` counters from `start`: int64 [X, 2], on the key's device."""
    check_counters(start, count)
    key_2 = _words(key_2)
    low_X = torch.arange(count, dtype=torch.int64, device=key_2.device) + (start & _MASK)
    high_X = (low_X >> 32) + (start >> 32)
    return threefry_2x32(key_2, torch.stack([low_X & _MASK, high_X], dim=-1))


def uniforms(key_2: Tensor | np.ndarray, start: int, count: int, *, dtype: str = "float64") -> Tensor:
    """Return a uniform in [0, 1) for each of `count` counters from `start`: [X]; 24 bits in float32, 53 in float64."""
    bits_X2 = random_bits(key_2, start, count)
    if dtype == "float32":
        return (bits_X2[:, 0] >> 8).to(torch.float32) * 2.0**-24
    if dtype == "float64":
        high_X, low_X = (bits_X2[:, 0] >> 5).to(torch.float64), (bits_X2[:, 1] >> 6).to(torch.float64)
        return (high_X * 2.0**26 + low_X) * 2.0**-53
    raise SpecError(
        f"dtype = {dtype!r}: expected 'float32' or 'float64', because fewer bits are not uniform; try 'float32'"
    )


def _words(words: Tensor | np.ndarray) -> Tensor:
    if isinstance(words, Tensor):
        return words.to(torch.int64)
    return torch.from_numpy(np.asarray(words).astype(np.int64))
