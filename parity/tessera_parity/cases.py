"""Generated cases: whole models (`ModelCase`) and inputs of single operations, all from seeds, all replayable.

Sizes are odd and unequal so that swapped axes show, and come from small pools because eager JAX compiles every
primitive for every new shape. What varies freely is values: scale from 1e-4 to 1e2, offsets, ties, constant rows,
positions past 512, ignored labels, packing, padding, windows, soft caps, rope scalings.
"""

import dataclasses
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tessera_parity.draws import Draw
from tessera_shared.errors import ParityError
from tessera_shared.numerics import FLOAT64, Numerics
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.spec import ARCHITECTURES, ModelSpec, RopeSpec
from tessera_shared.tensors import EMBEDDING, tensor_table

STYLES = ("normal", "small", "large", "offset", "ties", "constant", "tiny")
"""How values are distributed; see `draws.values`."""

OP_SIZES: tuple[dict[str, int], ...] = (
    {"B": 2, "T": 5, "S": 7, "X": 9, "D": 12, "F": 20, "N": 4, "K": 2, "H": 6, "V": 13},
    {"B": 1, "T": 1, "S": 1, "X": 1, "D": 1, "F": 3, "N": 1, "K": 1, "H": 2, "V": 2},
    {"B": 3, "T": 4, "S": 4, "X": 6, "D": 10, "F": 10, "N": 6, "K": 3, "H": 4, "V": 31},
    {"B": 1, "T": 17, "S": 19, "X": 33, "D": 33, "F": 7, "N": 3, "K": 3, "H": 10, "V": 7},
)

MODEL_SIZES: tuple[dict[str, int], ...] = (
    {"L": 2, "D": 12, "F": 20, "N": 4, "K": 2, "H": 6, "V": 29, "B": 2, "T": 7},
    {"L": 1, "D": 10, "F": 14, "N": 3, "K": 1, "H": 4, "V": 11, "B": 1, "T": 1},
    {"L": 3, "D": 16, "F": 24, "N": 2, "K": 2, "H": 8, "V": 37, "B": 3, "T": 5},
    {"L": 2, "D": 20, "F": 13, "N": 6, "K": 3, "H": 4, "V": 23, "B": 1, "T": 17},
    {"L": 1, "D": 9, "F": 11, "N": 1, "K": 1, "H": 10, "V": 17, "B": 2, "T": 9},
)


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A model with its weights and one batch. Cut it with `dataclasses.replace`; `seed` is set only while it is as
    drawn."""

    spec: ModelSpec
    params: dict[str, np.ndarray]  # float64, keyed by the tensor table
    token_ids_BT: np.ndarray
    labels_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    seed: tuple[int, ...] = ()  # what `model_case` drew it from
    pool: int = len(MODEL_SIZES)
    notes: tuple[str, ...] = field(default=())  # what is special about it, for people

    def teacher_logits(self) -> np.ndarray:
        """Return float64 teacher logits of this case's shape, drawn from its seed."""
        shape = (*self.token_ids_BT.shape, self.spec.vocab_size)
        return 2.0 * _rng(self.seed, "teacher").standard_normal(shape)

    def to_json(self) -> dict[str, Any]:
        """Return what `model_case_from_json` needs to draw it again, with the spec for people."""
        return {
            "kind": "model",
            "seed": list(self.seed),
            "pool": self.pool,
            "notes": list(self.notes),
            "sizes": {"B": self.token_ids_BT.shape[0], "T": self.token_ids_BT.shape[1]},
            "spec": dataclasses.asdict(self.spec),
        }


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """The inputs of one operation, as NumPy."""

    function: str  # "model.norms.rms_norm"
    inputs: dict[str, Any]
    seed: tuple[int, ...]
    sizes: dict[str, int]
    style: str

    def to_json(self) -> dict[str, Any]:
        """Return what `op_case` needs to draw it again."""
        return {
            "kind": "op",
            "function": self.function,
            "seed": list(self.seed),
            "sizes": self.sizes,
            "style": self.style,
        }


def case_seed(seed: int, subject: str, index: int) -> tuple[int, ...]:
    """Return the seed of one case of one subject, independent of every other's."""
    return (seed, zlib.crc32(subject.encode()), index)


def specs(seed: int, count: int, *, pool: int = len(MODEL_SIZES)) -> list[ModelSpec]:
    """Return `count` generated specs."""
    return [model_case(case_seed(seed, "specs", index), pool=pool).spec for index in range(count)]


def model_case(seed: int | Sequence[int], *, pool: int = len(MODEL_SIZES)) -> ModelCase:
    """Return the model and batch that `seed` stands for, with sizes from the first `pool` of `MODEL_SIZES`."""
    key = (seed,) if isinstance(seed, int) else tuple(int(word) for word in seed)
    rng = _rng(key, "shape")
    sizes = MODEL_SIZES[int(rng.integers(min(pool, len(MODEL_SIZES))))]
    spec = generated_spec(sizes, _rng(key, "spec"))
    token_ids_BT = _rng(key, "tokens").integers(0, spec.vocab_size, (sizes["B"], sizes["T"])).astype(np.int32)
    layout, positions_BT, segments_BT = _positions(sizes["B"], sizes["T"], _rng(key, "positions"))
    ignored, labels_BT = _labels(spec, segments_BT, _rng(key, "labels"))
    scales, params = _params(spec, _rng(key, "params"))
    return ModelCase(
        spec=spec,
        params=params,
        token_ids_BT=token_ids_BT,
        labels_BT=labels_BT,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        seed=key,
        pool=pool,
        notes=(layout, ignored, scales),
    )


def model_case_from_json(value: Mapping[str, Any]) -> ModelCase:
    """Draw a case again. Raises `ParityError` when this version draws another model from that seed."""
    case = model_case(value["seed"], pool=int(value.get("pool", len(MODEL_SIZES))))
    if "spec" in value and dataclasses.asdict(case.spec) != dict(value["spec"]):
        raise ParityError(
            f"case seed = {list(case.seed)}: expected the recorded spec, because a case is replayed from its seed and this "
            "version draws another model from it; try the version that wrote the report"
        )
    return case


def generated_spec(sizes: Mapping[str, int], rng: np.random.Generator) -> ModelSpec:
    """Return a spec of these sizes with everything else drawn: family, biases, norms, windows, caps, rope, tying."""
    architecture = str(rng.choice(ARCHITECTURES))
    window = int(rng.choice([1, 3, 6])) if rng.random() < 0.4 else None
    layers = sizes.get("L", 1)
    return ModelSpec(
        architecture=architecture,
        vocab_size=sizes["V"],
        num_layers=layers,
        width=sizes["D"],
        ffn_width=sizes["F"],
        num_heads=sizes["N"],
        num_kv_heads=sizes["K"],
        head_width=sizes["H"],
        max_positions=8192,
        norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        rope=generated_rope(rng),
        qkv_bias=architecture == "qwen2" or bool(rng.random() < 0.4),
        output_bias=bool(rng.random() < 0.3),
        mlp_bias=bool(rng.random() < 0.3),
        qk_norm=architecture == "qwen3" or bool(rng.random() < 0.2),
        sliding_window=window,
        window_from_layer=int(rng.integers(0, layers)) if window else 0,
        attention_softcap=float(rng.choice([2.0, 30.0])) if rng.random() < 0.3 else None,
        logit_softcap=float(rng.choice([3.0, 30.0])) if rng.random() < 0.3 else None,
        tie_embeddings=bool(rng.random() < 0.5),
        real_vocab_size=sizes["V"] - 1 if rng.random() < 0.2 else None,
    )


def generated_rope(rng: np.random.Generator) -> RopeSpec:
    """Return a rotary embedding of one of the four scaling rules, with a context short enough for the rule to bite."""
    scaling = str(rng.choice(["none", "none", "linear", "llama3", "yarn"]))
    theta = float(rng.choice([100.0, 10000.0, 500000.0]))
    if scaling == "none":
        return RopeSpec(theta=theta)
    return RopeSpec(
        theta=theta,
        scaling=scaling,
        factor=float(rng.choice([2.0, 5.5])),
        original_max_positions=None if scaling == "linear" else int(rng.choice([32, 256])),
        truncate=bool(rng.random() < 0.7),
        attention_factor=1.25 if scaling == "yarn" and rng.random() < 0.3 else None,
    )


def op_case(
    function: str,
    callable_: Callable[..., Any],
    seed: Sequence[int],
    *,
    sizes: Mapping[str, int],
    style: str,
    numerics: Numerics = FLOAT64,
) -> OpCase:
    """Return inputs for a paired function, drawn from its signature."""
    rng = _rng(tuple(seed), function)
    inputs = inputs_for(callable_, sizes, rng, style=style, numerics=numerics)
    return OpCase(function=function, inputs=inputs, seed=tuple(seed), sizes=dict(sizes), style=style)


def inputs_for(
    function: Callable[..., Any],
    sizes: Mapping[str, int],
    rng: np.random.Generator,
    *,
    style: str = "normal",
    numerics: Numerics = FLOAT64,
) -> dict[str, Any]:
    """Return a NumPy value for every argument of `function`, from its name: shape suffix, or the rule for that word.

    Optional arguments that have no rule keep their default. Raises `ParityError` for a required argument without one.
    """
    parameters = inspect.signature(function).parameters
    draw = Draw(
        sizes=dict(sizes), rng=rng, style=style, numerics=numerics, names=tuple(parameters), spec_of=generated_spec
    )
    inputs: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if draw.has_rule(name):
            inputs[name] = draw.value(name, optional=parameter.default is None)
        elif parameter.default is inspect.Parameter.empty:
            raise ParityError(
                f"argument = {name!r} of {getattr(function, '__name__', function)}: expected a shape suffix or a name with a "
                "rule in tessera_parity/draws.py, because inputs are built from names; try a suffix such as x_BTD"
            )
    return inputs


def bring(array_of: Callable[[np.ndarray], Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with every NumPy array, also inside dictionaries, brought into a half by `half.array`."""
    return {name: _brought(array_of, value) for name, value in inputs.items()}


def _brought(array_of: Callable[[np.ndarray], Any], value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return array_of(value)
    if isinstance(value, Mapping):
        return {name: _brought(array_of, item) for name, item in value.items()}
    return value


def _positions(rows: int, length: int, rng: np.random.Generator) -> tuple[str, np.ndarray, np.ndarray]:
    """Return a layout's name, positions and segments: plain, far (past 512), packed documents, or padded at the end."""
    layout = str(rng.choice(["plain", "far", "packed", "padded"]))
    positions_BT = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segments_BT = np.zeros((rows, length), np.int32)
    if layout == "far":
        positions_BT += rng.integers(513, 4000, (rows, 1)).astype(np.int32)
    for row in range(rows if layout in ("packed", "padded") else 0):
        cut = int(rng.integers(1, length + 1))
        segments_BT[row, cut:] = 1 if layout == "packed" else -1
        positions_BT[row, cut:] -= cut
        if layout == "padded":
            positions_BT[row, cut:] = -1
    return layout, positions_BT, segments_BT


def _labels(spec: ModelSpec, segments_BT: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Return how many labels are ignored, and labels; padding is always ignored."""
    kind = str(rng.choice(["none ignored", "some ignored", "some ignored", "all ignored"], p=[0.4, 0.3, 0.2, 0.1]))
    labels_BT = rng.integers(0, spec.real_vocab_size or spec.vocab_size, segments_BT.shape).astype(np.int32)
    share = {"none ignored": 0.0, "some ignored": 0.4, "all ignored": 1.1}[kind]
    return kind, np.where((rng.random(labels_BT.shape) < share) | (segments_BT < 0), IGNORE_INDEX, labels_BT).astype(
        np.int32
    )


def _params(spec: ModelSpec, rng: np.random.Generator) -> tuple[str, dict[str, np.ndarray]]:
    """Return a sentence about the scales, and float64 weights: every gain and bias away from one and zero."""
    embedding = float(10.0 ** rng.uniform(-4.0, 2.0)) if rng.random() < 0.5 else 1.0
    matrix = float(rng.choice([0.1, 0.5, 1.0, 1.4]))
    params: dict[str, np.ndarray] = {}
    for name, info in tensor_table(spec).items():
        value = rng.standard_normal(info.shape)
        if name == EMBEDDING:
            params[name] = value * embedding * (matrix / np.sqrt(spec.width) if spec.tie_embeddings else 1.0)
        elif info.init == "normal":
            params[name] = value * matrix / np.sqrt(info.shape[1])
        else:
            params[name] = 0.3 * value + (1.0 if info.init == "ones" else 0.0)
    return f"embedding scale {embedding:.1e}, matrix scale {matrix}", params


def _rng(seed: tuple[int, ...], what: str) -> np.random.Generator:
    return np.random.default_rng((*seed, zlib.crc32(what.encode())))
