"""Rotary positions in Hugging Face's `config.json` and `RopeSpec`, both ways (`modeling_rope_utils.py`).

The spelling of transformers 4 (`rope_theta`, `rope_scaling`) and that of 5 (`rope_parameters`) are both read and both
written, since version 4 passes over `rope_parameters` in silence.
"""

import sys
from collections.abc import Mapping
from typing import Any

from tessera_shared.errors import SpecError
from tessera_shared.spec import RopeSpec

_ROPE_FIELDS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": (
        *("factor", "original_max_positions", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def rope_from_config(config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    """Return the rule that `rope_parameters`, or `rope_theta` and `rope_scaling`, state; where both stand they agree.

    SpecError names a rule, field or value that is unknown, missing or contradictory.
    """
    old, new = (_rope_dict(config, name) for name in ("rope_scaling", "rope_parameters"))
    theta = config.get("rope_theta")
    readings = []
    for name, given in (("rope_scaling", old), ("rope_parameters", new)):
        if given:
            readings.append(
                _rope_spec(name, {"rope_theta": theta} | given if theta is not None else given, max_positions)
            )
    if len(set(readings)) > 1:
        raise SpecError(
            "rope_scaling and rope_parameters differ: expected the same rule in both, because each version of "
            "transformers reads another one; try removing rope_scaling"
        )
    rope = readings[0] if readings else RopeSpec(theta=10000.0 if theta is None else real_number("rope_theta", theta))
    if theta is not None and real_number("rope_theta", theta) != rope.theta:
        raise SpecError(
            f"rope_theta = {theta}, rope_parameters.rope_theta = {rope.theta}: expected the same base, because there "
            "is one; try removing rope_theta"
        )
    return rope


def _rope_dict(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise SpecError(f"{name} = {value!r}: expected an object or null, because it holds named numbers; try null")
    return dict(value or {})


def _rope_spec(source: str, given: dict[str, Any], max_positions: int) -> RopeSpec:
    kind = given.pop("rope_type", given.get("type", "default"))
    if given.pop("type", kind) != kind:
        raise SpecError(f"{source}: rope_type and type differ: expected one rule; try removing type")
    scaling = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}.get(str(kind))
    if scaling is None:
        raise SpecError(
            f"{source}.rope_type = {kind!r}: expected default, linear, llama3 or yarn, because these are implemented; "
            "try a checkpoint without it"
        )
    if given.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise SpecError(
            f"{source}.partial_rotary_factor: expected 1, because every dimension is rotated; try removing it"
        )
    theta = real_number("rope_theta", given.pop("rope_theta", 10000.0))
    if "original_max_position_embeddings" in given:
        given["original_max_positions"] = given.pop("original_max_position_embeddings")
    unknown = sorted(set(given) - set(_ROPE_FIELDS[scaling]))
    if unknown:
        raise SpecError(f"{source}.{unknown[0]}: not a field of {kind} scaling; try removing it if it means nothing")
    return RopeSpec(theta=theta, scaling=scaling, **_rope_numbers(source, scaling, given, max_positions))


def _rope_numbers(source: str, scaling: str, given: dict[str, Any], max_positions: int) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    if "original_max_positions" in _ROPE_FIELDS[scaling]:
        original = given.pop("original_max_positions", max_positions)
        if type(original) is not int or original < 1:
            raise SpecError(
                f"{source}.original_max_position_embeddings = {original!r}: expected a length; try {max_positions}"
            )
        numbers["original_max_positions"] = original
        if scaling == "yarn" and "factor" in given and given["factor"] is None:
            given["factor"] = max_positions / original
    required = {"none": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(scaling, ("factor",))
    for name in required:
        if name not in given:
            raise SpecError(
                f"{source}.{name}: missing; expected a number, because {scaling} scaling has no default for it"
            )
    if "truncate" in given:
        numbers["truncate"] = given.pop("truncate")
        if not isinstance(numbers["truncate"], bool):
            raise SpecError(f"{source}.truncate = {numbers['truncate']!r}: expected true or false; try true")
    for name, value in given.items():
        # transformers takes `beta or default` and `if mscale and mscale_all_dim`, so null and 0 mean "the default".
        if value is not None and not (value == 0 and name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")):
            numbers[name] = real_number(f"{source}.{name}", value)
    return numbers


def config_from_rope(rope: RopeSpec) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and `rope_parameters`, so that each version of transformers finds its own."""
    scaling: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
    for name in _ROPE_FIELDS[rope.scaling]:
        value = getattr(rope, name)
        if value is not None and not (name == "truncate" and value):
            scaling["original_max_position_embeddings" if name == "original_max_positions" else name] = value
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling if rope.scaling != "none" else None,
        "rope_parameters": {"rope_theta": rope.theta} | scaling,
    }


def real_number(name: str, value: Any) -> float:
    """Return a JSON number as a float. SpecError, naming it, for anything else (true and 1e999 included)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise SpecError(f"{name} = {value!r}: expected a finite number, because it enters the arithmetic; try a number")
    return float(value)
