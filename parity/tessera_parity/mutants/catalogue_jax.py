"""Planted bugs of the JAX half: some mirror the torch side's, some only this framework invites."""

from tessera_parity.mutants.mutant import Mutant


def _jax(
    name: str, kind: str, file: str, find: str, replace: str, op: str, *, hints: tuple[str, ...] = (), note: str = ""
) -> Mutant:
    return Mutant(
        name=f"jax-{name}", half="jax", kind=kind, file=f"tessera_jax/{file}", find=find, replace=replace,
        expected_op=op, hints=hints, note=note,
    )  # fmt: skip


_MODEL = (
    _jax(
        "norm-eps-missing", "algebra", "model/norms.py", "keepdims=True) + eps)", "keepdims=True))", "attention.norm",
    ),
    _jax(
        "norm-eps-1e-6", "algebra", "model/norms.py", "keepdims=True) + eps)", "keepdims=True) + 1e-6)",
        "attention.norm",
        note="flax's default epsilon",
    ),
    _jax(
        "norm-gain-plus-one", "algebra", "model/norms.py", "return unit_BTD.astype(compute) * gain_BTD",
        "return unit_BTD.astype(compute) * (1.0 + gain_BTD)", "attention.norm", note="Gemma's convention of stored gains",
    ),
    _jax(
        "norm-gain-before-cast", "precision", "model/norms.py", "return unit_BTD.astype(compute) * gain_BTD",
        "return (unit_BTD * gain_BTD).astype(compute)", "attention.norm", hints=("rounding",),
        note="bfloat16 times float32 promotes silently: OLMo-2, transformers 38131",
    ),
    _jax(
        "rope-interleaved", "rope", "model/rope.py",
        "first, second = jnp.split(x_BTNH, 2, axis=-1)\n    rotated_BTNH = jnp.concatenate([-second, first], axis=-1)",
        "first, second = x_BTNH[..., ::2], x_BTNH[..., 1::2]\n"
        "    rotated_BTNH = jnp.stack([-second, first], axis=-1).reshape(x_BTNH.shape)",
        "attention.q_rope",
    ),
    _jax(
        "rope-positions-from-one", "rope", "model/rope.py", "positions_BT[..., None].astype(up)",
        "(positions_BT[..., None] + 1).astype(up)", "rope_tables",
        note="a global offset: rotation is relative, so no logit moves, yet caches of the two halves do not mix",
    ),
    _jax(
        "rope-theta-fixed", "rope", "model/rope.py", "inverse_H2 = jnp.asarray(frequencies, dtype=up)",
        "inverse_H2 = 1.0 / 10000.0 ** (jnp.arange(len(frequencies), dtype=up) / len(frequencies))", "rope_tables",
        note="theta and scaling of the config ignored",
    ),
    _jax("mask-sees-next", "mask", "model/attention.py", "(key <= query)", "(key <= query + 1)", "attention_mask"),
    _jax(
        "window-one-too-narrow", "mask", "model/attention.py", "query - key < window", "query - key < window - 1",
        "attention_mask",
    ),
    _jax(
        "padding-attends", "mask", "model/attention.py", " & (segments_BT[:, :, None] >= 0)", "", "attention_mask",
        note="padded queries look at padded keys",
    ),
    _jax(
        "gqa-tiled-scores", "index", "model/attention.py",
        "q_BTKGH = q_BTNH.astype(up).reshape(rows, queries, kv_heads, heads // kv_heads, width)\n"
        '    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH,',
        "q_BTKGH = q_BTNH.astype(up).reshape(rows, queries, heads // kv_heads, kv_heads, width)\n"
        '    scores = jnp.einsum("btgkh,bskh->bgkts", q_BTKGH,',
        "attention.scores", note="jnp.tile where jnp.repeat is meant",
    ),
    _jax(
        "softcap-undivided", "algebra", "model/attention.py", "softcap * jnp.tanh(scores_BNTS / softcap)",
        "softcap * jnp.tanh(scores_BNTS)", "attention.scores",
    ),
    _jax(
        "softmax-unshifted-max", "algebra", "model/attention.py",
        "shifted = visible - lax.stop_gradient(jnp.max(visible, axis=-1, keepdims=True))",
        "shifted = visible - lax.stop_gradient(jnp.max(visible, axis=-2, keepdims=True))",
        "attention.probs", note="maximum over queries instead of keys: equal until something overflows or vanishes",
    ),
    _jax(
        "softmax-in-compute-dtype", "precision", "model/attention.py", "scores_BNTS.astype(dtype_of(numerics.softmax))",
        "scores_BNTS.astype(dtype_of(numerics.compute))", "attention.probs", hints=("rounding",),
        note="native bfloat16 softmax: 2.7e-3 in parity anchors, section 8",
    ),
    _jax(
        "probs-stop-gradient", "gradient", "model/attention.py",
        "probs_BKGTS = probs_BNTS.reshape(rows, kv_heads, heads // kv_heads, queries, keys)",
        "probs_BKGTS = lax.stop_gradient(probs_BNTS).reshape(rows, kv_heads, heads // kv_heads, queries, keys)",
        "attention.mix", hints=("gradients",), note="queries and keys never learn",
    ),
    _jax(
        "output-projection-from-values", "index",
        "model/attention.py", 'mix_BTNH = see("mix", attention_mix(probs_BNTS, v))',
        'mix_BTNH = see("mix", attention_mix(probs_BNTS, k))', "attention.mix",
    ),
    _jax(
        "gelu-for-silu", "algebra", "model/mlp.py", "jax.nn.silu(", "jax.nn.gelu(", "mlp.act",
        note="and gelu means tanh here, erf in torch",
    ),
    _jax(
        "activation-in-compute-dtype", "precision", "model/mlp.py", "up = dtype_of(numerics.activation)",
        "up = dtype_of(numerics.compute)", "mlp.act", hints=("rounding",),
    ),
    _jax(
        "mlp-reads-attention-norm", "index", "model/mlp.py", "post_attention_layernorm.weight",
        "input_layernorm.weight",
        "mlp.norm",
    ),
    _jax("bias-doubled", "algebra", "model/linear.py", "return y_BTF + bias_BTF", "return y_BTF + 2.0 * bias_BTF",
    "attention.q"),
    _jax(
        "residual-stop-gradient", "gradient", "model/transformer.py", "x_BTD + mixed_BTD)",
        "jax.lax.stop_gradient(x_BTD) + mixed_BTD)", "residual", hints=("gradients",),
    ),
    _jax(
        "final-norm-eps", "algebra", "model/transformer.py", "params[FINAL_NORM], eps=spec.norm_eps,",
        "params[FINAL_NORM], eps=1e-6,", "final_norm",
    ),
    _jax(
        "embedding-scaled", "algebra", "model/transformer.py", "return table_VD[token_ids_BT]",
        "return table_VD[token_ids_BT] * table_VD.shape[1] ** 0.5", "embed",
        note="Gemma scales embeddings, Llama does not",
    ),
    _jax(
        "recompute-freezes-weights", "gradient", "model/transformer.py", "            step = jax.checkpoint(step)\n",
        "            frozen = {name: jax.lax.stop_gradient(value) for name, value in params.items()}\n"
        "            step = jax.checkpoint(partial(step, frozen))\n"
        "            x_BTD = step(x_BTD, cos_BTH, sin_BTH, mask_BTS)\n"
        "            continue\n",
        "recompute", hints=("gradients",), note="weights closed over as constants by a recomputed block",
    ),
    _jax(
        "logits-in-compute-dtype", "precision", "model/transformer.py", "up = dtype_of(numerics.logits)",
        "up = x_BTD.dtype", "logits", hints=("rounding",),
    ),
)  # fmt: skip

_SERVING = (
    _jax(
        "cache-padding-wraps", "cache", "model/cache.py", "jnp.where(positions_BT < 0, memory.shape[1], positions_BT)",
        "positions_BT", "cache", hints=("decode",),
        note="position -1 writes the last slot: negative indices wrap in JAX",
    ),
    _jax(
        "cache-positions-not-written", "cache", "model/cache.py",
        'new["positions_BS"] = _written(cache["positions_BS"], positions_BT, positions_BT)', "pass",
        "cache.positions", hints=("decode",),
    ),
    _jax(
        "cache-returns-old-keys", "cache",
        "model/cache.py", 'return new[f"layers.{layer}.k"], new[f"layers.{layer}.v"]',
        'return cache[f"layers.{layer}.k"], new[f"layers.{layer}.v"]', "attention.scores", hints=("decode",),
        note="reads before it writes",
    ),
    _jax(
        "decode-position-off-by-one", "cache", "model/cache.py",
        "cos_BTH, sin_BTH = rope_tables(positions_BT, spec=spec, numerics=numerics)",
        "cos_BTH, sin_BTH = rope_tables(\n"
        "        positions_BT + int(positions_BT.shape[1] == 1), spec=spec, numerics=numerics\n    )",
        "attention.q_rope", hints=("decode",),
    ),
    _jax(
        "generate-one-uniform-for-all", "sampling", "serve/decode.py", "uniforms_B = uniforms_BT[:, index]",
        "uniforms_B = uniforms_BT[:, 0]", "generate", hints=("decode",),
    ),
    _jax(
        "sampler-unstable-ties", "sampling", "serve/sampling.py",
        "order_BV = jnp.argsort(lifted_BV, axis=-1, descending=True, stable=True).astype(jnp.int32)",
        "order_BV = jnp.argsort(lifted_BV, axis=-1)[:, ::-1].astype(jnp.int32)", "sample.temperature",
        hints=("sampling",), note="ascending sort reversed: ties come highest id first",
    ),
    _jax(
        "top-k-drops-one", "sampling", "serve/sampling.py", "rank_V < num_kept",
        "rank_V < (num_kept - 1 if top_k else num_kept)", "sample.top_k", hints=("sampling",),
    ),
    _jax(
        "top-p-keeps-one-more", "sampling", "serve/sampling.py", "before_BV < top_p",
        "before_BV - probs_BV < top_p", "sample.top_p", hints=("sampling",),
    ),
    _jax(
        "min-p-of-kept-mass", "sampling", "serve/sampling.py", "min_p * probs_BV[:, :1]", "min_p * cumulative_BV",
        "sample.min_p", hints=("sampling",),
    ),
)  # fmt: skip

_LOSSES = (
    _jax(
        "ignore-index-wraps", "loss", "distil/losses.py", "return jnp.where(counts_BT, loss_BT, 0.0), counts_BT",
        "return loss_BT, counts_BT", "cross_entropy", hints=("losses",),
        note="a plausible loss at label -100: optax and V > 100",
    ),
    _jax(
        "temperature-scale-always", "loss", "distil/losses.py",
        "if options.temperature_scale is TemperatureScale.SQUARED:", "if options.temperature_scale:",
        "distillation_loss",
        hints=("losses",),
    ),
    _jax(
        "hard-weight-on-the-soft-side", "loss", "distil/losses.py",
        "(1.0 - options.hard_weight) * loss_BT + options.hard_weight * hard_BT",
        "options.hard_weight * loss_BT + (1.0 - options.hard_weight) * hard_BT", "distillation_loss", hints=("losses",),
    ),
    _jax(
        "reverse-kl-is-forward", "loss", "distil/_terms.py",
        "case Divergence.REVERSE_KL:\n            loss, qw, pu = _skewed(q, p, -log_ratio, 0.0)",
        "case Divergence.REVERSE_KL:\n            loss, pu, qw = _skewed(p, q, log_ratio, 0.0)",
        "reverse_kl", hints=("losses",), note="KL direction",
    ),
    _jax(
        "jsd-mixture-swapped", "loss", "distil/_terms.py", "mixture = beta * p + (1.0 - beta) * q",
        "mixture = (1.0 - beta) * p + beta * q", "generalized_jsd", hints=("losses",),
    ),
    _jax(
        "total-variation-doubled", "loss", "distil/_terms.py", "loss, pu, qw = 0.5 * jnp.abs(difference),",
        "loss, pu, qw = jnp.abs(difference),", "total_variation", hints=("losses",), note="distance without the half",
    ),
    _jax(
        "soft-cross-entropy-gradient", "gradient", "distil/_terms.py",
        "loss, pu, qw = -(p * log_q), -(p * log_q), -_times_expm1(q, log_ratio, p)",
        "loss, pu, qw = -(p * log_q), -(p * log_q), _times_expm1(q, log_ratio, p)",
        "soft_cross_entropy", hints=("losses",), note="sign of a hand-written slope: value right, training runs uphill",
    ),
    _jax(
        "hidden-cosine-unhalved", "reduction", "distil/losses.py", "half_BT = 0.5 * jnp.square(",
        "half_BT = jnp.square(",
        "hidden_cosine", hints=("losses",),
    ),
    _jax(
        "padding-vocabulary-counts", "loss", "distil/losses.py",
        "        student_BTV = student_BTV[..., : options.real_vocab_size]\n",
        "        student_BTV = student_BTV[..., : options.real_vocab_size] * 1.0\n"
        "        leaked_BT1 = 1e-3 * student_BTV.sum(-1, keepdims=True)\n"
        "        student_BTV = student_BTV - leaked_BT1 * (jnp.arange(options.real_vocab_size) == 0)\n",
        "distillation_loss", hints=("losses",), note="padding rows leak into the student's distribution",
    ),
)  # fmt: skip

_TRAINING = (
    _jax(
        "clip-scales-up", "optimizer", "train/optim.py", "max_norm / jnp.maximum(norm, max_norm)", "max_norm / norm",
        "clip_by_global_norm", hints=("optimizer",), note="small gradients blown up to the limit",
    ),
    _jax(
        "betas-swapped", "optimizer", "train/optim.py", "optax.tree.update_moment(grads, state.mu, options.beta1, 1)",
        "optax.tree.update_moment(grads, state.mu, options.beta2, 1)", "adamw.first_moment", hints=("optimizer",),
    ),
    _jax(
        "second-moment-of-first-power", "optimizer", "train/optim.py",
        "optax.tree.update_moment(grads, state.nu, options.beta2, 2)",
        "optax.tree.update_moment(grads, state.nu, options.beta2, 1)", "adamw.second_moment", hints=("optimizer",),
    ),
    _jax(
        "bias-correction-in-float32", "optimizer", "train/optim.py",
        "-jnp.expm1(step.astype(moment.dtype) * math.log(beta))",
        "(1.0 - jnp.float32(beta) ** step).astype(moment.dtype)",
        "adamw.update", hints=("optimizer",), note="Optax's own: 1.5e-5 at the first update",
    ),
    _jax(
        "epsilon-inside-root", "optimizer", "train/optim.py",
        "(jnp.sqrt(_unbiased(second[name], options.beta2, step)) + options.eps)",
        "jnp.sqrt(_unbiased(second[name], options.beta2, step) + options.eps)", "adamw.epsilon", hints=("optimizer",),
    ),
    _jax(
        "decay-mask-dropped", "optimizer", "train/optim.py",
        ", mask={name: decay_mask[name] for name in params})\n    change, _",
        ")\n    change, _",
        "adamw.decay", hints=("optimizer",),
    ),
    _jax(
        "denominator-of-last-batch", "reduction", "train/step.py",
        "return jax.tree.map(jnp.add, sums, sums_of(batch)), None",
        "new = sums_of(batch)\n        return (sums[0] + new[0], new[1], jax.tree.map(jnp.add, sums[2], new[2])), None",
        "train_step", hints=("training",), note="sum of gradients over the wrong number of tokens",
    ),
)  # fmt: skip

MUTANTS = _MODEL + _SERVING + _LOSSES + _TRAINING
