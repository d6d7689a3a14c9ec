"""Repro of a broken law: one side against itself, on the smallest model that still breaks it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity.budget import law_limit
from tessera_parity.cases import ModelCase
from tessera_parity.compare import Difference, relative_difference
from tessera_parity.halves import Half
from tessera_parity.localize import STATE, SURPRISES, Culprit
from tessera_parity.repro_files import Point, write_file
from tessera_parity.repro_model import weight_lines
from tessera_parity.repro_source import Source
from tessera_parity.shrink import SIZE_STAGES, Shrunk, cut_down, is_seeded, seeded_params
from tessera_parity.subjects import laws
from tessera_parity.subjects.context import QUICK
from tessera_shared.errors import ParityError

MAX_ATTEMPTS = 60
MAX_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class _Broken:
    pair: int  # which of the pairs of arrays that the law yields
    left: np.ndarray
    right: np.ndarray
    difference: Difference


def write_law_repro(
    half: Half, stored: Mapping[str, Any], out: Path, *, name: str, lane: str = QUICK
) -> tuple[list[Path], Shrunk]:
    """Write the file of a broken law, the model cut (its tokens are the law's own). Raises `ParityError` when it
    holds."""
    law = next((one for one in laws.LAWS if one.__name__ == stored["law"]), None)
    if law is None:
        raise ParityError(
            f"law = {stored['law']!r}: expected one of the laws of this version, because it is replayed; try the version "
            "that wrote the report"
        )
    model = laws.model_of(half, tuple(int(word) for word in stored["seed"]), lane)
    tokens_BT = model.token_ids_BT
    places = np.zeros_like(tokens_BT)
    case = ModelCase(
        spec=model.spec, params=model.arrays, token_ids_BT=tokens_BT, labels_BT=tokens_BT, positions_BT=places,
        segments_BT=places,
    )  # fmt: skip

    def fails(smaller: ModelCase) -> bool:
        try:
            return _broken(half, law, smaller) is not None
        except SURPRISES:
            return False

    if not fails(case):
        raise ParityError(
            f"repro of {name}: expected {law.__name__} broken by {half.name}, because a repro must show it; try the "
            "version and machine that wrote the report"
        )
    found = cut_down(case, fails, SIZE_STAGES, max_attempts=MAX_ATTEMPTS, max_seconds=MAX_SECONDS)
    small = found.thing
    seeded = ModelCase(**{**vars(small), "params": seeded_params(small.spec, 0)})
    small = seeded if fails(seeded) else small
    last = _broken(half, law, small)
    assert last is not None, "the shrinker returns what fails"
    shrunk = Shrunk(case=small, cuts=found.cuts, attempts=found.attempts, finished=found.finished,
                    values_seed=0 if is_seeded(small) else None)  # fmt: skip
    return [_write(half, law, small, last, out, name)], shrunk


def _broken(half: Half, law: Callable[..., laws.Sides], case: ModelCase) -> _Broken | None:
    model = laws.LawModel(half=half, spec=case.spec, arrays=case.params, token_ids_BT=case.token_ids_BT)
    limit = _limit(case)
    for index, (left, right) in enumerate(law(model)):
        difference = relative_difference(left, right)
        if difference.value > limit:
            return _Broken(pair=index, left=left, right=right, difference=difference)
    return None


def _limit(case: ModelCase) -> float:
    return law_limit(case.spec, num_positions=laws.POSITIONS + laws.OFFSET)


def _write(half: Half, law: Callable[..., laws.Sides], case: ModelCase, broken: _Broken, out: Path, name: str) -> Path:
    source, gap = Source(), broken.difference
    where = gap.where or (0,) * broken.left.ndim
    source.needs("tessera_parity.subjects", "laws")
    source.needs("tessera_parity.loading", "load_half")
    lines = [
        f"SPEC = {source.of(case.spec)}",
        *weight_lines(case, source),
        f"token_ids_BT = {source.of(case.token_ids_BT, 'token_ids')}",
        f"half = load_half({half.name!r}, device={half.device!r})",
        "model = laws.LawModel(half=half, spec=SPEC, arrays=weights, token_ids_BT=token_ids_BT)",
        f"left, right = list(laws.{law.__name__}(model))[{broken.pair}]",
        f"result = left[{where}] - right[{where}]",
    ]
    said = " ".join((law.__doc__ or "").split()).rstrip(".")
    point = Point(
        what=f"{law.__name__} ({said}), left minus right{list(where)}", pick="result",
        half_value=float(broken.left[where]) - float(broken.right[where]), oracle_value=0.0, scale=float(gap.scale),
        limit=_limit(case), against="itself",
    )  # fmt: skip
    culprit = Culprit(
        half=half.name, op=f"the law {law.__name__}", observed=gap.value, limit=point.limit, direction=STATE
    )
    return write_file(out, name, half.name, source, lines, point, culprit)
