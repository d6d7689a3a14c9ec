"""Programs over whole models: a pass that raises, generation, a cache with padding."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import ModelCase
from tessera_parity.repro_model import case_lines
from tessera_parity.repro_op import fewer
from tessera_parity.repro_source import Source, module_of
from tessera_parity.shrink import candidates, is_seeded, seeded_params

Arrays = Mapping[str, np.ndarray]


def smaller_cases(case: ModelCase, *, leaping: bool = True) -> Iterator[tuple[str, ModelCase]]:
    """Yield cut cases, leaps first, and the same case with weights that a seed makes again."""
    yield from candidates(case, leaping=leaping)
    if not is_seeded(case):
        yield "seeded values", replace(case, params=seeded_params(case.spec, 0))


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Logits of one pass over a case: for what no tap can name, such as a half that raises."""

    case: ModelCase

    @property
    def about(self) -> str:
        """See `Program`."""
        return "model.transformer.forward"

    @property
    def limit(self) -> float:
        """See `Program`."""
        return budget.model_limit(self.case.spec, num_positions=self.case.token_ids_BT.shape[1])

    @property
    def size(self) -> tuple[int | None, int | None]:
        """See `Program`."""
        return self.case.spec.num_layers, int(self.case.token_ids_BT.size)

    def floor(self, truth: Arrays) -> float:
        """See `Program`."""
        del truth
        return 0.0

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        source.needs(module_of(side, "model.transformer"), "forward")
        return [
            *case_lines(self.case, source),
            "result = forward(",
            "    params, token_ids_BT, spec=SPEC, numerics=FLOAT64, positions_BT=positions_BT, segments_BT=segments_BT",
            ")",
        ]

    def smaller(self) -> "Iterator[tuple[str, Forward]]":
        """See `Program`."""
        for what, case in smaller_cases(self.case):
            yield what, replace(self, case=case)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Free-running tokens of a model; compared to equality in float64."""

    case: ModelCase
    uniforms_BT: np.ndarray
    sampling: Mapping[str, float | int] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """See `Program`."""
        return "serve.decode.generate"

    @property
    def limit(self) -> float:
        """See `Program`: token ids are equal or they are not."""
        return budget.EXACT

    @property
    def size(self) -> tuple[int | None, int | None]:
        """See `Program`; tokens of the prompt and those written."""
        rows = self.case.token_ids_BT.shape[0]
        return self.case.spec.num_layers, int(self.case.token_ids_BT.size) + rows * self.uniforms_BT.shape[1]

    def floor(self, truth: Arrays) -> float:
        """See `Program`."""
        del truth
        return 0.0

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        source.needs(module_of(side, "serve.decode"), "generate")
        uniforms = self.uniforms_BT[: self.case.token_ids_BT.shape[0]]
        options = "".join(f", {name}={value!r}" for name, value in self.sampling.items())
        return [
            *case_lines(self.case, source),
            f"uniforms_BT = array({source.of(uniforms, 'uniforms')})",
            "result = generate(",
            f"    params, token_ids_BT, spec=SPEC, numerics=FLOAT64, num_tokens={uniforms.shape[1]},",
            f"    uniforms_BT=uniforms_BT{options},",
            ")",
        ]

    def smaller(self) -> "Iterator[tuple[str, Generated]]":
        """See `Program`."""
        written = self.uniforms_BT.shape[1]
        for kept in fewer(written):
            yield f"tokens written {written} -> {kept}", replace(self, uniforms_BT=self.uniforms_BT[:, :kept])
        for what, case in smaller_cases(self.case):
            yield what, replace(self, case=case)


@dataclass(frozen=True, kw_only=True)
class RaggedCache:
    """Two cached calls over rows of unequal length, the padding of the shorter ones included; the cache they leave."""

    case: ModelCase

    @property
    def about(self) -> str:
        """See `Program`."""
        return "model.cache.forward_cached"

    @property
    def limit(self) -> float:
        """See `Program`."""
        return budget.model_limit(self.case.spec, num_positions=self.case.token_ids_BT.shape[1])

    @property
    def size(self) -> tuple[int | None, int | None]:
        """See `Program`."""
        return self.case.spec.num_layers, int(self.case.token_ids_BT.size)

    def floor(self, truth: Arrays) -> float:
        """See `Program`."""
        del truth
        return 0.0

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        source.needs(module_of(side, "model.cache"), "empty_cache", "forward_cached")
        rows, length = self.case.token_ids_BT.shape
        first = max(1, length - 1)
        return [
            *case_lines(self.case, source),
            f"ROWS, LENGTH, FIRST = {rows}, {length}, {first}",
            "cache = empty_cache(params, spec=SPEC, numerics=FLOAT64, batch=ROWS, capacity=LENGTH)",
            "places = np.tile(np.arange(FIRST, dtype=np.int32), (ROWS, 1))",
            "places[ROWS // 2 :, FIRST // 2 :] = -1  # half of the rows are half as long, the rest is padding",
            "result = {}",
            "for start, stop, places_BT in ((0, FIRST, places), (FIRST, LENGTH, places.max(axis=1, keepdims=True) + 1)):",
            "    if stop > start:",
            "        logits_BTV, cache = forward_cached(",
            "            params, token_ids_BT[:, start:stop], cache, spec=SPEC, numerics=FLOAT64,",
            "            positions_BT=array(places_BT.astype(np.int32)),",
            "        )",
            "        result = dict(cache)",
        ]

    def smaller(self) -> "Iterator[tuple[str, RaggedCache]]":
        """See `Program`."""
        for what, case in smaller_cases(self.case):
            yield what, replace(self, case=case)
