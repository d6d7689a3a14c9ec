"""Every random number of the project: Threefry-2x32-20 by (seed, stream name, 64-bit counter).

Salmon, Moraes, Dror, Shaw: *Parallel random numbers: as easy as 1, 2, 3* (SC11); rotations and key schedule as in
Random123. A value depends on its seed, its stream's name and its counter and on nothing else: no state,
no order of draws, no framework, no world size. `randomness.py` in tessera_torch and tessera_jax gives the same bits.
"""

import numpy as np

from tessera_shared.errors import SpecError

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
"""Left rotations of the eight rounds that repeat."""

PARITY = 0x1BD11BDA
"""Third word of the key schedule: key[0] ^ key[1] ^ PARITY (Threefish's constant, its 32-bit half)."""

ROUNDS = 20


def threefry_2x32(key_2: np.ndarray, counters_X2: np.ndarray) -> np.ndarray:
    """Encrypt counters: a bijection of 64-bit blocks for each key.

    Before rounds 0, 4, 8, .. and after the last, add key words k[s] and k[s+1] (indices modulo 3), and s to the second
    word; s counts the injections. A round is `a += b; b = rotl(b, r) ^ a`. All words uint32, arithmetic modulo 2**32;
    leading axes of the counters are free. Word 0 of a counter is its low half.
    """
    words = [np.uint32(word) for word in np.asarray(key_2, dtype=np.uint32)]
    words.append(words[0] ^ words[1] ^ np.uint32(PARITY))
    counters_X2 = np.asarray(counters_X2, dtype=np.uint32)
    first, second = counters_X2[..., :1] + words[0], counters_X2[..., 1:] + words[1]
    for round_index in range(ROUNDS):
        rotation = ROTATIONS[round_index % 8]
        first = first + second
        second = ((second << np.uint32(rotation)) | (second >> np.uint32(32 - rotation))) ^ first
        if round_index % 4 == 3:
            injection = round_index // 4 + 1
            first = first + words[injection % 3]
            # one scalar sum in Python integers: NumPy warns when a scalar overflows
            second = second + np.uint32((int(words[(injection + 1) % 3]) + injection) & 0xFFFFFFFF)
    return np.concatenate([first, second], axis=-1)


def stream_key(seed: int, name: str) -> np.ndarray:
    """Return the key of a named stream, uint32 [2]: the seed, then the name absorbed 8 bytes at a time.

    key <- seed as (low, high); for each block of (length of the name's UTF-8 as 8 bytes, then the bytes, padded with
    zeros to a multiple of 8; words little-endian): key <- threefry(key, block) ^ block (Miyaguchi and Preneel's
    chaining without the key term). Different names or seeds give unrelated streams; this is mixing, not cryptography.
    """
    if not 0 <= seed < 2**64:
        raise SpecError(f"seed = {seed}: expected 0 to 2**64 - 1, because it fills two 32-bit words; try seed=0")
    encoded = name.encode()
    message = len(encoded).to_bytes(8, "little") + encoded + b"\0" * (-len(encoded) % 8)
    key_2 = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)
    for block_2 in np.frombuffer(message, dtype="<u4").reshape(-1, 2).astype(np.uint32):
        key_2 = threefry_2x32(key_2, block_2) ^ block_2
    return key_2


def counter_words(start: int, count: int) -> np.ndarray:
    """Return the counters start, start + 1, .. as uint32 [X, 2] (low word, high word).

    Raises SpecError where a counter would not fit 64 bits.
    """
    check_counters(start, count)
    low_X = np.arange(count, dtype=np.uint64) + np.uint64(start & 0xFFFFFFFF)
    high_X = (low_X >> np.uint64(32)) + np.uint64(start >> 32)
    return np.stack([low_X & np.uint64(0xFFFFFFFF), high_X], axis=-1).astype(np.uint32)


def check_counters(start: int, count: int) -> None:
    """Raise SpecError unless counters start .. start + count - 1 are 64-bit numbers and count fits 32 bits."""
    if not (start >= 0 and 0 <= count <= 2**32 and start + count <= 2**64):
        raise SpecError(
            f"start = {start}, count = {count}: expected 0 <= start, 0 <= count <= 2**32 and start + count <= 2**64, "
            "because a counter is 64 bits; try a second stream"
        )


def random_bits(key_2: np.ndarray, start: int, count: int) -> np.ndarray:
    """Return two random 32-bit words for each of `count` counters from `start`: uint32 [X, 2]."""
    return threefry_2x32(key_2, counter_words(start, count))


def uniforms(key_2: np.ndarray, start: int, count: int, *, dtype: str = "float64") -> np.ndarray:
    """Return one uniform in [0, 1) for each of `count` counters from `start`: [X].

    float64: 53 bits, (27 high bits of word 0) * 2**26 + (26 high bits of word 1), times 2**-53. float32: the 24 high
    bits of word 0, times 2**-24; that is the float64 value rounded down, so both dtypes draw the same point.
    """
    bits_X2 = random_bits(key_2, start, count)
    if dtype == "float32":
        return (bits_X2[:, 0] >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    if dtype == "float64":
        high_X = (bits_X2[:, 0] >> np.uint32(5)).astype(np.float64)
        low_X = (bits_X2[:, 1] >> np.uint32(6)).astype(np.float64)
        return (high_X * 2.0**26 + low_X) * 2.0**-53
    raise SpecError(
        f"dtype = {dtype!r}: expected 'float32' or 'float64', because fewer bits are not uniform; try 'float32'"
    )
