"""Random streams: the same bits in NumPy, torch and JAX, and Random123's known answers in each."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tessera_parity.exact import Equalities
from tessera_parity.halves import Half
from tessera_parity.result import Check
from tessera_parity.subjects.context import Context, Subject
from tessera_shared import randomness

KNOWN_ANSWERS = (
    # counter, key, encrypted: Random123's kat_vectors for threefry2x32, 20 rounds
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
)


def run(context: Context) -> Iterator[Check]:
    """Yield known answers for all three, then bits and uniforms of each half against NumPy's."""
    known = Equalities("streams", "known answers", ("numpy",))
    for counter, key, answer in KNOWN_ANSWERS:
        known.arrays(randomness.threefry_2x32(_words(key), _words(counter)), _words(answer), f"counter {counter}")
    yield known.check("Random123, threefry2x32 with 20 rounds")
    for half in context.halves:
        yield from _half_checks(context, half)


def _half_checks(context: Context, half: Half) -> Iterator[Check]:
    module = half.module("randomness")
    known = Equalities("streams", "known answers", (half.name,))
    for counter, key, answer in KNOWN_ANSWERS:
        bits = half.numpy(module.threefry_2x32(_words(key), _words(counter)))
        known.arrays(bits.astype(np.uint32), _words(answer), f"counter {counter}")
    yield known.check()
    bits_check = Equalities("streams", "bits", ("numpy", half.name))
    uniform_check = Equalities("streams", "uniforms", ("numpy", half.name))
    rng = np.random.default_rng((context.seed, 23))
    for index in range(context.budget(quick=4, default=12, full=60)):
        context.advance(f"streams: {half.name} {index + 1}")
        key_2 = randomness.stream_key(int(rng.integers(2**63)), f"stream {index}")
        start, count = _start(rng, index), (1, 7, 64)[index % 3]
        bits = half.numpy(module.random_bits(key_2, start, count))
        bits_check.arrays(bits.astype(np.uint32), randomness.random_bits(key_2, start, count), f"start {start}")
        for dtype in ("float32", "float64"):
            drawn = half.numpy(module.uniforms(key_2, start, count, dtype=dtype))
            truth = randomness.uniforms(key_2, start, count, dtype=dtype).astype(np.float64)
            uniform_check.arrays(drawn.astype(np.float64), truth, f"start {start}, {dtype}")
    yield bits_check.check()
    yield uniform_check.check()


def _start(rng: np.random.Generator, index: int) -> int:
    """Counters near zero, across the 32-bit boundary, and anywhere."""
    return (0, 2**32 - 3, int(rng.integers(2**62)))[index % 3]


def _words(pair: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.array(pair, dtype=np.uint32)


SUBJECT = Subject(
    name="streams", about="random bits and uniforms of all three, with Random123's known answers", run=run
)
