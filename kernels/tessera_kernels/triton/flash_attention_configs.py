"""Tile sizes of the attention kernels: the list that the GPU lane runs and the sweep times, and the choice among them.

The choice depends on head width and dtype alone: no timing at run time, so that a graph replays what it recorded.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from tessera_kernels.launching import SHARED_BYTES
from tessera_shared.errors import KernelError

FLOAT32_SCORES = 2048
"""Largest tile of scores in float32, whose products are unrolled multiply-adds: more would spill and compile for minutes."""

SUMS_AND_SCORES = 224
"""Registers a thread that accumulators and tiles of scores may take; the compiler needs the rest, and spills without it."""

ADDS = ("split", "pointer", "descriptor")
"""What `KeyConfig.fused` stands for: a kernel of its own for dQ, or additions by pointer or by descriptor (TMA)."""


class ForwardConfig(NamedTuple):
    """How the forward is cut up. Integers only: it travels through a custom op's schema."""

    block_m: int  # queries of a tile
    block_n: int  # keys of a tile
    num_warps: int
    stages: int  # tiles of K and V in flight
    tma: int  # 1 = bulk copies by descriptor where the strides allow; 0 = pointers always

    def shared_bytes(self, padded: int, itemsize: int) -> int:
        """Estimate the shared memory: Q, and K and V in flight, or the result on its way out."""
        tiles = self.block_m + 2 * self.stages * self.block_n
        return max(tiles * padded * itemsize, self.block_m * padded * 4) + 2048

    def registers(self, padded: int) -> int:
        """Estimate what a thread holds: the mix, S in float32, P in half precision."""
        return (self.block_m * padded + self.block_m * self.block_n * 3 // 2) // (32 * self.num_warps)


class KeyConfig(NamedTuple):
    """How dK and dV (and dQ when fused) are cut up."""

    block_m: int  # queries of a tile, which stream
    block_n: int  # keys of a tile, which stay
    num_warps: int
    stages: int
    keys_first: int  # 1 = scores as [key, query]
    fused: int  # index of `ADDS`
    tma: int
    early: int = 0  # 1 = dP is issued before the exponentials

    def shared_bytes(self, padded: int, itemsize: int) -> int:
        """Estimate the shared memory: K and V, Q and dO in flight, P and dS turned, dQ on its way out."""
        tiles = (2 * self.block_n + 2 * self.stages * self.block_m) * padded * itemsize
        turned = (2 - self.keys_first) * self.block_m * self.block_n * itemsize
        leaving = self.block_m * padded * 4 if self.fused == 2 else self.block_m * self.block_n * itemsize
        return tiles + turned + (leaving if self.fused else 0) + 4096

    def registers(self, padded: int) -> int:
        """Estimate what a thread holds: dK, dV, two tiles of scores and dQ; a third tile fits beside narrow heads only."""
        held = 2 * self.block_n * padded + 2 * self.block_m * self.block_n + bool(self.fused) * self.block_m * padded
        return held // (32 * self.num_warps) + 32 * self.early * (padded > (64 if self.fused else 128))


class QueryConfig(NamedTuple):
    """How dQ is cut up when it has a kernel of its own."""

    block_m: int
    block_n: int
    num_warps: int
    stages: int
    tma: int

    def shared_bytes(self, padded: int, itemsize: int) -> int:
        """Estimate the shared memory: Q and dO, K and V in flight."""
        return (2 * self.block_m + 2 * self.stages * self.block_n) * padded * itemsize + 4096

    def registers(self, padded: int) -> int:
        """Estimate what a thread holds: dQ and two tiles of scores."""
        return (self.block_m * padded + 2 * self.block_m * self.block_n) // (32 * self.num_warps) + 32


class AttentionConfig(NamedTuple):
    """One configuration of both directions."""

    forward: ForwardConfig
    keys: KeyConfig
    queries: QueryConfig

    @property
    def deterministic(self) -> bool:
        """Is every sum in one fixed order?"""
        return self.keys.fused == 0


FORWARD: tuple[ForwardConfig, ...] = (
    ForwardConfig(64, 128, 4, 1, 1),  # width 128: three programs a multiprocessor, one works while the others wait
    ForwardConfig(64, 128, 4, 2, 1),  # width 64: three programs
    ForwardConfig(128, 64, 8, 2, 1),  # width 256
    ForwardConfig(128, 128, 8, 3, 1),
    ForwardConfig(128, 64, 4, 2, 1),  # width 128: two programs
    ForwardConfig(256, 64, 8, 3, 1),  # the same in one program: keys and values are copied half as often
    ForwardConfig(128, 64, 8, 3, 1),
    ForwardConfig(64, 64, 4, 4, 1),
    ForwardConfig(128, 32, 4, 3, 1),
    ForwardConfig(128, 32, 8, 3, 1),  # width 128: two programs of eight warps
    ForwardConfig(64, 32, 4, 2, 0),  # no descriptors
    ForwardConfig(128, 64, 8, 2, 0),
    ForwardConfig(32, 32, 8, 1, 0),  # float32
)
KEYS: tuple[KeyConfig, ...] = (
    KeyConfig(64, 128, 8, 3, 1, 2, 1, 0),  # fused
    KeyConfig(64, 128, 8, 3, 1, 2, 1, 1),
    KeyConfig(64, 64, 4, 3, 1, 2, 1, 1),  # width 64: two programs a multiprocessor
    KeyConfig(64, 64, 4, 2, 1, 2, 1, 0),  # width 64: three
    KeyConfig(128, 128, 8, 2, 1, 2, 1, 1),
    KeyConfig(128, 64, 8, 3, 0, 2, 1, 1),
    KeyConfig(64, 128, 8, 3, 1, 0, 1, 1),  # dQ by a kernel of its own
    KeyConfig(64, 128, 8, 3, 1, 0, 1, 0),
    KeyConfig(128, 64, 8, 2, 0, 0, 1, 1),
    KeyConfig(64, 64, 4, 2, 1, 0, 1, 1),  # width 128: two programs
    KeyConfig(128, 128, 8, 2, 1, 0, 1, 1),
    KeyConfig(64, 64, 8, 2, 1, 0, 1, 0),  # width 256
    KeyConfig(32, 64, 8, 1, 0, 0, 0, 0),  # no descriptors
    KeyConfig(32, 32, 8, 1, 0, 0, 0, 0),  # float32
)
QUERIES: tuple[QueryConfig, ...] = (
    QueryConfig(128, 64, 8, 3, 1),
    QueryConfig(128, 128, 8, 2, 1),
    QueryConfig(128, 128, 8, 3, 1),
    QueryConfig(64, 64, 4, 2, 1),  # two programs at width 128, more below
    QueryConfig(64, 64, 4, 3, 1),
    QueryConfig(128, 64, 8, 1, 1),  # width 256
    QueryConfig(128, 32, 8, 2, 1),
    QueryConfig(64, 32, 8, 2, 0),  # no descriptors
    QueryConfig(32, 32, 8, 1, 0),  # float32
)


def _configs() -> Iterator[AttentionConfig]:
    """Yield every part at least once, and `QUERIES` beside split keys, which alone use them."""
    fused = [keys for keys in KEYS if keys.fused]
    split = [keys for keys in KEYS if not keys.fused]
    pairs = [(keys, QUERIES[0]) for keys in fused]
    pairs += [(split[i % len(split)], QUERIES[i % len(QUERIES)]) for i in range(max(len(split), len(QUERIES)))]
    for i in range(max(len(FORWARD), len(pairs))):
        yield AttentionConfig(FORWARD[i % len(FORWARD)], *pairs[i % len(pairs)])


CONFIGS: tuple[AttentionConfig, ...] = tuple(_configs())
"""The directions are independent, so that not every pair is needed."""


def choose_config(width: int, dtype: torch.dtype) -> AttentionConfig:
    """Return the configuration for this head width and dtype, by what an H200 measured on 2026-11-21.

    dQ has a kernel of its own, so that every sum is in one order: two more products beside five cost less than additions
    into memory (S 4096: 3.2 ms against 4.1 at width 128, 2.2 against 2.5 at 64).
    """
    if dtype == torch.float32:  # no tensor cores at full precision: small tiles in plain registers
        keys = KeyConfig(32, 32, 8, 1, 0, 0, 0, 0)
        return AttentionConfig(ForwardConfig(32, 32, 8, 1, 0), keys, QueryConfig(32, 32, 8, 1, 0))
    if width > 128:
        keys = KeyConfig(64, 64, 8, 2, 1, 0, 1, 0)
        return AttentionConfig(ForwardConfig(128, 64, 8, 2, 1), keys, QueryConfig(64, 64, 4, 2, 1))
    keys = KeyConfig(64, 64, 4, 2, 1, 0, 1, 1)
    if width <= 64:
        return AttentionConfig(ForwardConfig(64, 128, 4, 2, 1), keys, QueryConfig(64, 64, 4, 3, 1))
    return AttentionConfig(ForwardConfig(64, 128, 4, 1, 1), keys, QueryConfig(128, 64, 8, 3, 1))


def expect_fitting(config: ForwardConfig | KeyConfig | QueryConfig, padded: int, itemsize: int) -> None:
    """Raise unless the configuration's tiles fit in shared memory and, in float32, in registers."""
    if itemsize == 4 and config.block_m * config.block_n > FLOAT32_SCORES:
        raise KernelError(
            f"config = {tuple(config)}: expected tiles of at most {FLOAT32_SCORES} scores for float32, because full precision "
            "has no tensor cores; try config=None"
        )
    if itemsize == 2 and config.registers(padded) > SUMS_AND_SCORES:
        raise KernelError(
            f"config = {tuple(config)}: expected at most {SUMS_AND_SCORES} registers a thread for sums and scores, because a "
            f"thread has 255, and at head width {padded} these take {config.registers(padded)}; try config=None"
        )
    needed = config.shared_bytes(padded, itemsize)
    if needed > SHARED_BYTES:
        raise KernelError(
            f"config = {tuple(config)}: expected at most {SHARED_BYTES} bytes of shared memory, because a block has no more, "
            f"and tiles of head width {padded} take {needed}; try config=None"
        )
