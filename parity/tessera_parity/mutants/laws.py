"""Laws and known answers for what all sides share: parity cannot see a bug that reaches everyone alike.

Each is written apart from the code it judges: published test vectors, closed forms, and sentences of the spec's own
comments.
"""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np

from tessera_parity.loading import FreshModules, Patch
from tessera_parity.localize import STATE, Culprit
from tessera_shared.spec import ModelSpec, RopeSpec

Law = Callable[[ModuleType], bool]


def notice(patch: Patch) -> tuple[str | None, Culprit | None, str]:
    """Load the patched module, apply its laws, and name the first that is broken."""
    module = FreshModules(patch.module, (patch,)).load(patch.module)
    for op, law in LAWS.get(patch.module, ()):
        if not law(module):
            culprit = Culprit(half="shared", op=op, observed=1.0, limit=0.0, direction=STATE, detail=law.__name__)
            return "laws", culprit, (law.__doc__ or "").strip()
    return None, None, "every law holds"


def broken_laws() -> list[str]:
    """Return the laws that shared code as it is breaks: none, when all is well."""
    broken = []
    for name, laws in LAWS.items():
        module = FreshModules(name).load(name)
        broken += [f"{op}: {law.__name__}" for op, law in laws if not law(module)]
    return broken


def _warmup_moves_from_the_first_step(schedule: ModuleType) -> bool:
    """The first update has a rate above zero, the last warm-up step is below the peak, the next is the peak."""
    plan = schedule.Schedule(kind="cosine", peak=0.5, total_steps=20, warmup_steps=4, final=0.1)
    rates = [schedule.learning_rate(plan, step) for step in range(6)]
    return bool(0.0 < rates[0] < rates[1] < rates[3] < rates[4] == 0.5 > rates[5])


def _decay_meets_its_ends(schedule: ModuleType) -> bool:
    """Halfway between warm-up and end a cosine and a line are halfway between peak and final; at the end they are
    final."""
    for kind in ("cosine", "linear"):
        plan = schedule.Schedule(kind=kind, peak=0.5, total_steps=24, warmup_steps=4, final=0.1)
        if abs(schedule.learning_rate(plan, 14) - 0.3) > np.finfo(np.float64).eps:
            return False
        if schedule.learning_rate(plan, 24) != 0.1:
            return False
    return True


def _matrices_decay_and_nothing_else(tensors: ModuleType) -> bool:
    """Weight decay applies exactly to what has two axes."""
    spec = ModelSpec(
        vocab_size=7, num_layers=2, width=4, ffn_width=3, num_heads=2, num_kv_heads=1, head_width=2, max_positions=8,
        qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True,
    )  # fmt: skip
    return all(bool(info.decay) == (len(info.shape) == 2) for info in tensors.tensor_table(spec).values())


def _random123(randomness: ModuleType) -> bool:
    """Random123's known answer for counter and key of pi's digits."""
    key, counter = (np.array(words, np.uint32) for words in ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)))
    bits = randomness.threefry_2x32(key, counter[None])
    return bool(np.array_equal(bits, np.array([[0xC4923A9C, 0x483DF7A0]], np.uint32)))


def _counters_are_little_endian(randomness: ModuleType) -> bool:
    """Counter c is the block (c mod 2**32, c div 2**32), across the boundary too."""
    key = np.array([1, 2], np.uint32)
    words = np.array([[0xFFFFFFFF, 0], [0, 1]], np.uint32)
    expected = randomness.threefry_2x32(key, words)
    return bool(np.array_equal(randomness.random_bits(key, 2**32 - 1, 2), expected))


def _uniforms_are_below_one_and_nested(randomness: ModuleType) -> bool:
    """Uniforms lie in [0, 1) with mean one half, and a float32 draw is the float64 draw rounded down."""
    key = np.array([3, 4], np.uint32)
    wide = randomness.uniforms(key, 0, 4096)
    narrow = randomness.uniforms(key, 0, 4096, dtype="float32").astype(np.float64)
    nested = bool(np.all((narrow <= wide) & (wide - narrow < 2.0**-24)))
    return nested and bool(wide.min() >= 0.0 and wide.max() < 1.0) and abs(wide.mean() - 0.5) < 6 / math.sqrt(12 * 4096)


def _spec(rope: RopeSpec) -> ModelSpec:
    return ModelSpec(
        vocab_size=7, num_layers=1, width=4, ffn_width=3, num_heads=1, num_kv_heads=1, head_width=16, max_positions=8,
        rope=rope,
    )  # fmt: skip


def _llama3_keeps_fast_and_divides_slow(rope: ModuleType) -> bool:
    """Wavelengths under original / high stay, those over original / low are divided, those between lie between,
    decreasing."""
    rule = RopeSpec(theta=1000.0, scaling="llama3", factor=8.0, original_max_positions=256)
    plain, _ = rope.inverse_frequencies(_spec(RopeSpec(theta=1000.0)))
    scaled, factor = rope.inverse_frequencies(_spec(rule))
    turns = 256 * plain / (2.0 * math.pi)
    kept, divided = turns > rule.high_freq_factor, turns < rule.low_freq_factor
    between = ~kept & ~divided
    return bool(
        factor == 1.0
        and between.any()
        and np.array_equal(scaled[kept], plain[kept])
        and np.allclose(scaled[divided], plain[divided] / 8.0, rtol=8 * np.finfo(np.float64).eps, atol=0.0)
        and np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8.0))
    )


def _plain_frequencies(rope: ModuleType) -> bool:
    """theta^(-2j/H), and divided by the factor under linear scaling."""
    exponents = np.arange(8) / 8.0
    expected = np.exp(-exponents * math.log(500.0))
    plain, _ = rope.inverse_frequencies(_spec(RopeSpec(theta=500.0)))
    linear, _ = rope.inverse_frequencies(_spec(RopeSpec(theta=500.0, scaling="linear", factor=4.0)))
    close = np.max(np.abs(plain / expected - 1.0)) < 64 * np.finfo(np.float64).eps
    return bool(close and np.array_equal(linear, plain / 4.0))


def _yarn_factor(rope: ModuleType) -> bool:
    """YaRN's attention factor is 0.1 ln s + 1 (arXiv 2309.00071, equation 22): 1 at s = 1, about 1.139 at s = 4."""
    rule = RopeSpec(theta=1000.0, scaling="yarn", factor=4.0, original_max_positions=256)
    _, factor = rope.inverse_frequencies(_spec(rule))
    return bool(abs(factor - (0.1 * math.log(4.0) + 1.0)) < 4 * np.finfo(np.float64).eps)


def _window_starts_where_it_says(spec: ModuleType) -> bool:
    """Layers before `window_from_layer` attend to everything, that layer and later ones do not."""
    model = spec.ModelSpec(
        vocab_size=7, num_layers=3, width=4, ffn_width=3, num_heads=1, num_kv_heads=1, head_width=2, max_positions=8,
        sliding_window=5, window_from_layer=1,
    )  # fmt: skip
    return [model.window_of(layer) for layer in range(3)] == [None, 5, 5]


LAWS: dict[str, tuple[tuple[str, Law], ...]] = {
    "tessera_shared.schedule": (
        ("learning_rate", _warmup_moves_from_the_first_step),
        ("learning_rate", _decay_meets_its_ends),
    ),
    "tessera_shared.tensors": (("decay_mask", _matrices_decay_and_nothing_else),),
    "tessera_shared.randomness": (
        ("threefry_2x32", _random123),
        ("random_bits", _counters_are_little_endian),
        ("uniforms", _uniforms_are_below_one_and_nested),
    ),
    "tessera_shared.rope": (
        ("inverse_frequencies", _plain_frequencies),
        ("inverse_frequencies", _llama3_keeps_fast_and_divides_slow),
        ("inverse_frequencies", _yarn_factor),
    ),
    "tessera_shared.spec": (("window_of", _window_starts_where_it_says),),
}
"""The laws of each shared module, by the function that must keep them."""
