"""In which order do resident blocks take attention's tiles, so that they end together?

Each block takes every `across`-th tile. Causal tiles differ in work, and a head's come sorted by it: where waves run there and
back, no block gets the longest tile of every wave.
"""

import functools

import torch
from torch import Tensor

from tessera_kernels.cuda._attention_configs import BACKWARD_QUERIES


@functools.lru_cache(maxsize=256)
def turns(sizes: tuple[int, ...], block_m: int, block_n: int, across: int) -> bool:
    """Do `across` blocks end sooner when every other wave of a dense forward's tiles runs backwards?

    `sizes` as `flash_attention._problem` has them.
    """
    sequences, queries, keys, heads, _, section, blocks, before, after = sizes
    first = torch.arange(blocks - 1, -1, -1, device="cpu") * block_m + keys - queries  # key positions of first queries
    last = (first + block_m).clamp(max=keys) - 1
    low = (first - before).clamp(min=0) // block_n * block_n
    return _turns((last + after + 1).clamp(0, keys) - low, block_n, sequences * heads, section, across)


@functools.lru_cache(maxsize=256)
def backward_turns(sizes: tuple[int, ...], across: int) -> bool:
    """As `turns`, of the backward's tiles of 128 keys and the queries that see them."""
    sequences, queries, keys, heads, group, section, _, before, after = sizes
    first = torch.arange(0, keys, 128, device="cpu") - (keys - queries)  # where the first key stands among queries
    low = (first - after).clamp(min=0) // BACKWARD_QUERIES * BACKWARD_QUERIES
    high = ((first + 128).clamp(max=queries) + before).clamp(0, queries)
    return _turns((high - low) * group, BACKWARD_QUERIES, sequences * heads // group, section, across)


def _turns(work: Tensor, step: int, lanes: int, section: int, across: int) -> bool:
    """`work` of a head's tiles as they are taken; a block's time is its steps, and one more for each tile."""
    cost = (work.clamp(min=0) + step - 1) // step + 1
    whole, rest = divmod(lanes, section)
    costs = torch.cat([cost.repeat_interleave(section).repeat(whole), cost.repeat_interleave(rest)])
    waves = torch.nn.functional.pad(costs, (0, -len(costs) % across)).view(-1, across)
    straight = waves.sum(0).max()
    waves[1::2] = waves[1::2].flip(1)
    return bool(waves.sum(0).max() < straight)
