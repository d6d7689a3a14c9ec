"""Planted bugs of the torch half. Where a bug like it was real, the note says so."""

from tessera_parity.mutants.mutant import Mutant


def _torch(
    name: str, kind: str, file: str, find: str, replace: str, op: str, *, hints: tuple[str, ...] = (), note: str = ""
) -> Mutant:
    return Mutant(
        name=f"torch-{name}", half="torch", kind=kind, file=f"tessera_torch/{file}", find=find, replace=replace,
        expected_op=op, hints=hints, note=note,
    )  # fmt: skip


_NORMS_AND_ROPE = (
    _torch(
        "norm-eps-outside-root", "algebra", "model/norms.py",
        "lifted_BTD * torch.rsqrt(lifted_BTD.square().mean(-1, keepdim=True) + eps)",
        "lifted_BTD / (lifted_BTD.square().mean(-1, keepdim=True).sqrt() + eps)",
        "attention.norm", note="x / (rms + eps): several published re-implementations of RMSNorm",
    ),
    _torch(
        "norm-eps-1e-6", "algebra", "model/norms.py", "keepdim=True) + eps)", "keepdim=True) + 1e-6)",
        "attention.norm", note="framework default instead of the spec's epsilon; invisible in bfloat16",
    ),
    _torch(
        "norm-centered", "algebra", "model/norms.py", "lifted_BTD = x_BTD.to(up)",
        "lifted_BTD = x_BTD.to(up) - x_BTD.to(up).mean(-1, keepdim=True)",
        "attention.norm", note="LayerNorm's centering in an RMSNorm",
    ),
    _torch(
        "norm-in-compute-dtype", "precision", "model/norms.py", "lifted_BTD = x_BTD.to(up)", "lifted_BTD = x_BTD",
        "attention.norm", hints=("rounding",), note="missing upcast",
    ),
    _torch(
        "norm-gain-before-cast", "precision", "model/norms.py", "return unit_BTD.to(compute) * gain_D",
        "return (unit_BTD * gain_D).to(compute)",
        "attention.norm", hints=("rounding",), note="more accurate but different: OLMo-2, transformers 38131",
    ),
    _torch(
        "rope-interleaved", "rope", "model/rope.py",
        "first, second = x_BTNH.chunk(2, dim=-1)\n    rotated_BTNH = torch.cat([-second, first], dim=-1)",
        "first, second = x_BTNH[..., ::2], x_BTNH[..., 1::2]\n"
        "    rotated_BTNH = torch.stack([-second, first], dim=-1).flatten(-2)",
        "attention.q_rope", note="interleaved pairs under half-split tables: the classic of checkpoint conversion",
    ),
    _torch(
        "rope-turns-backwards", "rope", "model/rope.py", "[-second, first]", "[second, -first]", "attention.q_rope",
        note="sign of rotate_half",
    ),
    _torch(
        "rope-tables-interleaved", "rope", "model/rope.py", "torch.cat([angles, angles], dim=-1)",
        "angles.repeat_interleave(2, dim=-1)", "rope_tables",
    ),
    _torch(
        "rope-yarn-factor-on-cosine-only", "rope", "model/rope.py", "angles_BTH.sin() * attention_factor",
        "angles_BTH.sin()", "rope_tables",
    ),
    _torch(
        "rope-positions-in-bfloat16", "rope", "model/rope.py", "positions_BT[..., None].to(up)",
        "positions_BT[..., None].to(torch.bfloat16).to(up)",
        "rope_tables", note="positions beyond 256 collapse: parity anchors, section 8",
    ),
)  # fmt: skip

_QK_NORM = (
    "    if spec.qk_norm:\n"
    '        q = see("q_norm", rms_norm(q, params[prefix + "q_norm.weight"], eps=spec.norm_eps, numerics=numerics))\n'
    '        k = see("k_norm", rms_norm(k, params[prefix + "k_norm.weight"], eps=spec.norm_eps, numerics=numerics))\n'
)
_QK_ROPE = '    q, k = see("q_rope", apply_rope(q, cos_BTH, sin_BTH)), see("k_rope", apply_rope(k, cos_BTH, sin_BTH))\n'

_ATTENTION = (
    _torch(
        "mask-hides-self", "mask", "model/attention.py", "(key <= query)", "(key < query)", "attention_mask",
        note="off by one in the causal mask",
    ),
    _torch(
        "window-one-too-wide", "mask", "model/attention.py", "query - key < window", "query - key <= window",
        "attention_mask", note="Mistral's window counts the query itself",
    ),
    _torch(
        "documents-see-each-other", "mask", "model/attention.py",
        "same = (segments_BT[:, :, None] == key_segments_BS[:, None, :]) & (segments_BT[:, :, None] >= 0)",
        "same = (segments_BT[:, :, None] >= 0) & (key_segments_BS[:, None, :] >= 0)",
        "attention_mask", note="packing without a document mask",
    ),
    _torch(
        "gqa-tiled-scores", "index", "model/attention.py",
        "q_BTKGH = q_BTNH.to(up).reshape(rows, queries, kv_heads, heads // kv_heads, width)\n"
        '    scores = torch.einsum("btkgh,bskh->bkgts", q_BTKGH,',
        "q_BTKGH = q_BTNH.to(up).reshape(rows, queries, heads // kv_heads, kv_heads, width)\n"
        '    scores = torch.einsum("btgkh,bskh->bgkts", q_BTKGH,',
        "attention.scores", note="head n reads key head n % K instead of n // G: tile where repeat is meant",
    ),
    _torch(
        "gqa-tiled-mix", "index", "model/attention.py", '"bkgts,bskh->btkgh"', '"bkgts,bskh->btgkh"', "attention.mix",
        note="heads come out in another order than the output projection expects",
    ),
    _torch(
        "scores-scaled-by-width", "algebra", "model/attention.py", "/ math.sqrt(width)", "/ math.sqrt(heads * width)",
        "attention.scores", note="1 / sqrt(D) for models whose head width is not D / N",
    ),
    _torch(
        "attention-softcap-missing", "algebra", "model/attention.py",
        "return scores_BNTS if softcap is None else softcap * torch.tanh(scores_BNTS / softcap)",
        "return scores_BNTS", "attention.scores", note="Gemma 2 in engines that lacked the cap",
    ),
    _torch(
        "scores-in-compute-dtype", "precision", "model/attention.py", "up = dtype_of(numerics.softmax)",
        "up = q_BTNH.dtype", "attention.scores", hints=("rounding",), note="missing upcast before q k^T",
    ),
    _torch(
        "softmax-in-compute-dtype", "precision", "model/attention.py", "scores_BNTS.to(dtype_of(numerics.softmax))",
        "scores_BNTS.to(dtype_of(numerics.compute))", "attention.probs", hints=("rounding",),
        note="softmax done in bfloat16: pilot in parity anchors, section 4",
    ),
    _torch(
        "masked-row-is-uniform", "mask", "model/attention.py",
        "exponentials = shifted.exp().masked_fill(~mask_B1TS, 0.0)",
        "exponentials = shifted.exp()", "attention.probs", note="a padded query averages everything instead of nothing",
    ),
    _torch(
        "softmax-sum-detached", "gradient", "model/attention.py", "total = exponentials.sum(dim=-1, keepdim=True)",
        "total = exponentials.sum(dim=-1, keepdim=True).detach()", "attention.probs", hints=("gradients",),
        note="a stop-gradient too many: the forward pass is right",
    ),
    _torch(
        "key-norm-takes-query-gain", "index", "model/attention.py", 'params[prefix + "k_norm.weight"]',
        'params[prefix + "q_norm.weight"]', "attention.k_norm",
    ),
    _torch(
        "qk-norm-after-rope", "algebra", "model/attention.py",
        _QK_NORM + _QK_ROPE, _QK_ROPE + _QK_NORM,
        "attention.q_norm", note="order of norm and rotation in Qwen3-like models",
    ),
)  # fmt: skip

_REST_OF_MODEL = (
    _torch(
        "bias-fused-before-rounding", "precision", "model/linear.py",
        "y_BTF = functional.linear(x_BTD, weight_FD)", "return functional.linear(x_BTD, weight_FD, bias_F)",
        "attention.q", hints=("rounding",), note="one rounding instead of two: a fused epilogue",
    ),
    _torch("gelu-for-silu", "algebra", "model/mlp.py", "functional.silu(", "functional.gelu(", "mlp.act"),
    _torch(
        "gate-and-up-swapped", "index", "model/mlp.py", "swiglu(gate_BTF, up_BTF, numerics=numerics))",
        "swiglu(up_BTF, gate_BTF, numerics=numerics))", "mlp.act", note="fused gate_up weights split the wrong way",
    ),
    _torch(
        "activation-in-compute-dtype", "precision", "model/mlp.py", "up = dtype_of(numerics.activation)",
        "up = dtype_of(numerics.compute)", "mlp.act", hints=("rounding",),
    ),
    _torch(
        "residual-skips-attention", "algebra", "model/transformer.py",
        '_see(tap, f"layers.{layer}.out", x_BTD + fed_BTD)',
        '_see(tap, f"layers.{layer}.out", mixed_BTD + fed_BTD)', "out",
    ),
    _torch(
        "residual-detached", "gradient", "model/transformer.py", "x_BTD + mixed_BTD)", "x_BTD.detach() + mixed_BTD)",
        "residual", hints=("gradients",), note="the gradient of lower layers flows through attention alone",
    ),
    _torch(
        "always-tied", "index", "model/transformer.py", "params[EMBEDDING if spec.tie_embeddings else UNEMBEDDING]",
        "params[EMBEDDING]", "logits", note="tie_word_embeddings ignored on loading",
    ),
    _torch(
        "logit-softcap-unscaled", "algebra", "model/transformer.py", "softcap * torch.tanh(logits_BTV / softcap)",
        "torch.tanh(logits_BTV / softcap)", "logits",
    ),
    _torch(
        "window-in-every-layer", "mask", "model/transformer.py", "mask_BTS = masks[spec.window_of(layer)]",
        "mask_BTS = masks[spec.sliding_window]", "attention.probs", note="Qwen's max_window_layers ignored",
    ),
    _torch(
        "logits-in-compute-dtype", "precision", "model/transformer.py", "up = dtype_of(numerics.logits)",
        "up = x_BTD.dtype", "logits", hints=("rounding",),
    ),
)  # fmt: skip

_SERVING = (
    _torch(
        "cache-slot-off-by-one", "cache", "model/cache.py", ".gather(1, source_BT).clamp(min=0)",
        ".gather(1, source_BT).sub(1).clamp(min=0)", "cache.positions", hints=("decode",),
    ),
    _torch(
        "cache-values-stale", "cache", "model/cache.py", "        _write(values_BSKH, v_BTKH, places)\n", "",
        "cache.v", hints=("decode",),
    ),
    _torch(
        "cache-empty-slots-visible", "cache", "model/cache.py", "torch.full((batch, capacity), -1,",
        "torch.full((batch, capacity), 0,", "cache.empty", hints=("decode",),
        note="unwritten slots pass for position 0",
    ),
    _torch(
        "decode-position-off-by-one", "cache", "model/cache.py",
        "cos_BTH, sin_BTH = rope_tables(positions_BT, spec=spec, numerics=numerics)",
        "cos_BTH, sin_BTH = rope_tables(\n"
        "        positions_BT + int(positions_BT.shape[1] == 1), spec=spec, numerics=numerics\n    )",
        "attention.q_rope", hints=("decode",),
        note="the first generated token counted from 1: prefill agrees, decoding drifts",
    ),
    _torch(
        "generate-first-position", "sampling", "serve/decode.py", "logits_BTV[:, -1], uniforms_B",
        "logits_BTV[:, 0], uniforms_B",
        "generate", hints=("decode",), note="the next token read off the prompt's first position",
    ),
    _torch(
        "greedy-takes-last-tie", "sampling", "serve/sampling.py",
        "torch.where(is_best_BV, ids_V, logits_BV.shape[-1] - 1).amin(dim=-1)",
        "torch.where(is_best_BV, ids_V, 0).amax(dim=-1)", "greedy", hints=("sampling",),
    ),
    _torch(
        "temperature-multiplies", "sampling", "serve/sampling.py", "/ temperature, dim=-1)", "* temperature, dim=-1)",
        "sample.temperature", hints=("sampling",),
    ),
    _torch(
        "top-k-keeps-one-more", "sampling", "serve/sampling.py", "kept_BV[:, num_kept:] = False",
        "kept_BV[:, num_kept + 1 :] = False", "sample.top_k", hints=("sampling",),
    ),
    _torch(
        "top-p-drops-the-crossing-token", "sampling", "serve/sampling.py", "cumulative_BV[:, :-1] < top_p",
        "cumulative_BV[:, 1:] < top_p", "sample.top_p", hints=("sampling",),
        note="the token that reaches the mass is dropped: off by one in several samplers",
    ),
    _torch(
        "top-p-of-the-whole-distribution", "sampling", "serve/sampling.py",
        "< top_p * cumulative_BV[:, num_kept - 1 : num_kept]", "< top_p", "sample", hints=("sampling",),
        note="top_p before top_k: Hugging Face and vLLM take it of what top_k kept",
    ),
    _torch(
        "min-p-absolute", "sampling", "serve/sampling.py", "probs_BV >= min_p * probs_BV[:, :1]", "probs_BV >= min_p",
        "sample.min_p", hints=("sampling",),
    ),
    _torch(
        "sampler-edge-belongs-below", "sampling", "serve/sampling.py", "(cumulative_BV <= threshold_B1)",
        "(cumulative_BV < threshold_B1)", "sample", hints=("sampling",),
        note="u exactly on an edge of the distribution",
    ),
)  # fmt: skip

_LOSSES = (
    _torch(
        "ignored-labels-count", "loss", "distil/losses.py", "return torch.where(counts_BT, loss_BT, 0.0), counts_BT",
        "return loss_BT, counts_BT", "cross_entropy", hints=("losses",), note="ignored positions add a plausible loss",
    ),
    _torch(
        "z-loss-not-squared", "loss", "distil/losses.py", "z_loss * normalizer_BT.square()", "z_loss * normalizer_BT",
        "cross_entropy", hints=("losses",),
    ),
    _torch(
        "temperature-not-squared", "loss", "distil/losses.py", "options.temperature**2 * loss_BT",
        "options.temperature * loss_BT", "distillation_loss", hints=("losses",), note="tau for Hinton's tau squared",
    ),
    _torch(
        "rows-must-be-full-to-count", "reduction", "distil/losses.py", "counts_BT.any(-1)", "counts_BT.all(-1)",
        "distillation_loss", hints=("losses",),
    ),
    _torch(
        "forward-kl-is-reverse", "loss", "distil/_terms.py",
        "case Divergence.FORWARD_KL:\n            loss, pu, qw = _skewed(p, q, log_ratio, 0.0)",
        "case Divergence.FORWARD_KL:\n            loss, qw, pu = _skewed(q, p, -log_ratio, 0.0)",
        "forward_kl", hints=("losses",), note="KL direction: arguments of kl_div",
    ),
    _torch(
        "jsd-weights-swapped", "loss", "distil/_terms.py",
        "loss = beta * _terms(p, mixture, p_ratio) + (1.0 - beta) * _terms(q, mixture, q_ratio)",
        "loss = (1.0 - beta) * _terms(p, mixture, p_ratio) + beta * _terms(q, mixture, q_ratio)",
        "generalized_jsd", hints=("losses",), note="beta on the wrong side: GKD implementations differ here",
    ),
    _torch(
        "divergence-gradient-without-tau", "gradient", "distil/_terms.py",
        "return (a_times_slope - a * a_times_slope.sum(-1, keepdim=True)) / temperature",
        "return a_times_slope - a * a_times_slope.sum(-1, keepdim=True)",
        "forward_kl", hints=("losses",), note="hand-written backward that forgets d(z/tau)",
    ),
    _torch(
        "skew-mixture-detached", "gradient", "distil/_terms.py",
        "own = a * r if detach_own else a * r - alpha *", "own = a * r if not detach_own else a * r - alpha *",
        "skew_reverse_kl", hints=("losses",), note="the flag that stops the mixture's gradient, inverted",
    ),
    _torch(
        "top-k-keeps-every-tie", "index", "distil/_terms.py",
        "return above | (equal & (equal.cumsum(-1) <= room_BT1))", "return above | equal", "top_k_kl",
        hints=("losses",),
    ),
    _torch(
        "hidden-mse-sums", "reduction", "distil/losses.py", "(mapped_BTF - teacher_BTF).square().mean(-1)",
        "(mapped_BTF - teacher_BTF).square().sum(-1)", "hidden_mse", hints=("losses",),
    ),
    _torch(
        "log-softmax-in-compute-dtype", "precision", "distil/losses.py",
        "torch.log_softmax(logits_BTV.to(dtype_of(numerics.loss)), dim=-1)",
        "torch.log_softmax(logits_BTV.to(dtype_of(numerics.compute)), dim=-1)", "log_softmax", hints=("rounding",),
    ),
)  # fmt: skip

_TRAINING = (
    _torch(
        "norm-of-norms", "reduction", "train/optim.py", "torch.stack(squares).sum().sqrt()",
        "torch.stack(squares).sqrt().sum()", "global_norm", hints=("optimizer",), note="norms of tensors added up",
    ),
    _torch(
        "clip-with-epsilon", "optimizer", "train/optim.py", "max_norm / norm.clamp(min=max_norm)",
        "max_norm / (norm + 1e-6).clamp(min=max_norm)", "clip_by_global_norm", hints=("optimizer",),
        note="torch.nn.utils.clip_grad_norm_ adds 1e-6, Optax does not",
    ),
    _torch(
        "first-moment-undamped", "optimizer", "train/optim.py", "b1 * old_first + (1 - b1) * grad",
        "b1 * old_first + grad",
        "adamw.first_moment", hints=("optimizer",),
    ),
    _torch(
        "second-moment-takes-beta1", "optimizer", "train/optim.py", "b2 * old_second + (1 - b2) * grad.square()",
        "b1 * old_second + (1 - b1) * grad.square()", "adamw.second_moment", hints=("optimizer",), note="betas swapped",
    ),
    _torch(
        "bias-correction-off-by-one", "optimizer", "train/optim.py", "(first[name] / (1 - b1**t))",
        "(first[name] / (1 - b1 ** (t + 1)))", "adamw.update", hints=("optimizer",),
    ),
    _torch(
        "epsilon-inside-root", "optimizer", "train/optim.py", "((second[name] / (1 - b2**t)).sqrt() + options.eps)",
        "(second[name] / (1 - b2**t) + options.eps).sqrt()", "adamw.epsilon", hints=("optimizer",),
        note="place of epsilon: Adam's paper against several libraries",
    ),
    _torch(
        "decay-everything", "optimizer", "train/optim.py", "if decay_mask[name]:", "if decay_mask is not None:",
        "adamw.decay", hints=("optimizer",), note="gains and biases decayed",
    ),
    _torch(
        "mean-of-micro-means", "reduction", "train/step.py",
        "        if sums is not None:\n            loss, denominator =",
        "        grads = {name: grad / denominator for name, grad in grads.items()}\n"
        "        loss, denominator = loss / denominator, torch.ones_like(denominator)\n"
        "        if sums is not None:\n            loss, denominator =",
        "train_step", hints=("training",), note="gradient accumulation: transformers 34191, ms-swift 10084",
    ),
    _torch(
        "last-micro-batch-wins", "reduction", "train/step.py",
        "grads = {name: sums[2][name] + grad for name, grad in grads.items()}", "grads = dict(grads)",
        "train_step", hints=("training",),
    ),
    _torch(
        "table-mask-ignored", "optimizer", "train/step.py", "decay_mask = {name: info.decay for",
        "decay_mask = {name: bool(info) for",
        "train_step", hints=("training",),
    ),
)  # fmt: skip

MUTANTS = _NORMS_AND_ROPE + _ATTENTION + _REST_OF_MODEL + _SERVING + _LOSSES + _TRAINING
