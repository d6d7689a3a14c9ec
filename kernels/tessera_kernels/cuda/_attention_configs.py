"""Tile sizes of the attention in CUDA C++: the list that the GPU lane runs, and the choice among them.

The choice depends on head width and GPU alone: no timing at run time, so that a graph replays what it recorded.
"""

from typing import NamedTuple

import torch

from tessera_kernels.launching import SHARED_BYTES

DTYPES = (torch.bfloat16, torch.float16)

BACKWARD_QUERIES = 64
"""Queries that a step of the backward takes."""


class CudaConfig(NamedTuple):
    """How the forward is cut up. Integers only: it travels through a custom op's schema."""

    arch: int  # 90: flash_attention_sm90.cu, 80: flash_attention_sm80.cu
    groups: int  # 90: consumer warpgroups of 64 queries; 80: warps of 16 queries
    block_n: int  # keys of a tile
    stages: int  # 90: tiles of K and of V in flight; 80: always 2
    width: int = 0  # 0 = any; else the padded head width that it is for
    overlap: int = 2  # 90, backward: what runs beside products (see the source)

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return self.groups * (64 if self.arch == 90 else 16)

    @property
    def threads(self) -> int:
        """Threads of a block; on Hopper one warpgroup only copies."""
        return 128 * (self.groups + 1) if self.arch == 90 else 32 * self.groups

    def shared_bytes(self, padded: int) -> int:
        """Shared memory of a block: `struct Tiles` of the source, its barriers included."""
        return self._bytes(padded, self.query_stages(padded))

    def query_stages(self, padded: int) -> int:
        """Tiles of Q in shared memory: on Hopper two where they fit, so that the next one's copy hides."""
        return 2 if self.arch == 90 and self._bytes(padded, 2) <= SHARED_BYTES else 1

    def _bytes(self, padded: int, query_stages: int) -> int:
        tiles = 2 * padded * (self.block_m * query_stages + 2 * self.block_n * self.stages)
        return tiles + (1024 if self.arch == 90 else 0)


CONFIGS: tuple[CudaConfig, ...] = (
    CudaConfig(90, 3, 128, 2, 64),
    CudaConfig(90, 3, 128, 4, 64),
    CudaConfig(90, 2, 192, 2, 64),
    CudaConfig(90, 2, 128, 4, 64),
    CudaConfig(90, 2, 128, 2, 128),
    CudaConfig(90, 2, 128, 2, 128, overlap=1),
    CudaConfig(90, 3, 64, 3, 128),
    CudaConfig(90, 2, 64, 4, 128),
    CudaConfig(90, 2, 80, 2, 256),
    CudaConfig(90, 2, 64, 2, 256),
    CudaConfig(80, 4, 64, 2),
    CudaConfig(80, 8, 64, 2),
    CudaConfig(80, 4, 32, 2),
)
"""Every configuration that the GPU lane runs; `choose_config` picks for a width and a GPU."""


def choose_config(width: int, arch: int) -> CudaConfig:
    """Return the forward's configuration for a head width on a GPU of compute capability `arch` / 10."""
    padded = padded_width(width)
    if arch != 90:
        return CudaConfig(80, 4, 64 if padded < 256 else 32, 2)
    return {64: CudaConfig(90, 3, 128, 2, 64), 128: CudaConfig(90, 2, 128, 2, 128)}.get(
        padded, CudaConfig(90, 2, 64, 2, 256)
    )


def capability(device: torch.device) -> int:
    """Return ten times the compute capability: 90 on Hopper, and in the emulator, which knows both."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def padded_width(width: int) -> int:
    """Return the columns of a head in shared memory."""
    return 64 if width <= 64 else 128 if width <= 128 else 256
