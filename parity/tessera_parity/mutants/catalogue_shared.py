"""Planted bugs of what all sides share (`shared`) and of the oracle (`reference`): nobody may be above suspicion.

A bug in the oracle must be told from two bugs in two halves: both depart from it and agree with each other. A bug in
shared code reaches all three sides alike, so it takes laws and known answers that are written down apart from it
(`laws.py`).
"""

from tessera_parity.mutants.mutant import named

_REFERENCE = named(
    "reference", "reference", "tessera_shared/reference",
    (
        ("norm-without-eps", "algebra", "norms.py", "np.sqrt(mean_square_BT1 + eps)", "np.sqrt(mean_square_BT1)",
         "attention.norm"),
        ("rope-turns-backwards", "rope", "rope.py", "[-x_BTNH[..., half:], x_BTNH[..., :half]]",
         "[x_BTNH[..., half:], -x_BTNH[..., :half]]", "attention.q_rope"),
        ("mask-hides-self", "mask", "attention.py", "(key <= query)", "(key < query)", "attention_mask"),
        ("gqa-tiles", "index", "attention.py",
         "keys_BSNH = np.repeat(k_BSKH, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)",
         "keys_BSNH = np.tile(k_BSKH, (1, 1, q_BTNH.shape[2] // k_BSKH.shape[2], 1))", "attention.scores"),
        ("silu-is-sigmoid", "algebra", "mlp.py", "gate_BTF * sigmoid * up_BTF", "sigmoid * up_BTF", "mlp.act"),
        ("ignored-labels-count", "loss", "losses.py", "np.where(counts_BT, loss_BT, 0.0).sum()", "loss_BT.sum()",
         "cross_entropy"),
        ("second-moment-uncorrected", "optimizer", "optim.py", "np.sqrt(second[name] / (1 - b2**t))",
         "np.sqrt(second[name])", "adamw.update"),
        ("top-p-keeps-the-next", "sampling", "sampling.py", "mass >= top_p", "mass > top_p", "sample.top_p"),
    ),
)  # fmt: skip

_SHARED = named(
    "shared", "shared", "tessera_shared",
    (
        ("warmup-from-zero", "schedule", "schedule.py", "schedule.peak * (step + 1) / (schedule.warmup_steps + 1)",
         "schedule.peak * step / schedule.warmup_steps", "learning_rate"),
        ("schedule-one-step-early", "schedule", "schedule.py", "done = (step - schedule.warmup_steps)",
         "done = (step + 1 - schedule.warmup_steps)", "learning_rate"),
        ("gains-decay", "optimizer", "tensors.py", 'init="ones", decay=False', 'init="ones", decay=True', "decay_mask"),
        ("threefry-rotation", "randomness", "randomness.py", "ROTATIONS = (13, 15, 26, 6,",
         "ROTATIONS = (13, 15, 26, 7,",
         "threefry_2x32"),
        ("threefry-high-word-first", "randomness", "randomness.py",
         "np.stack([low_X & np.uint64(0xFFFFFFFF), high_X], axis=-1)",
         "np.stack([high_X, low_X & np.uint64(0xFFFFFFFF)], axis=-1)", "random_bits"),
        ("uniforms-reach-two", "randomness", "randomness.py", "np.float32(2.0**-24)", "np.float32(2.0**-23)",
         "uniforms"),
        ("llama3-bands-swapped", "rope", "rope.py", "if wavelength < original / rope.high_freq_factor:",
         "if wavelength < original / rope.low_freq_factor:", "inverse_frequencies"),
        ("yarn-attention-factor", "rope", "rope.py", "0.1 * weight * math.log(factor) + 1.0",
         "weight * math.log(factor) + 1.0", "inverse_frequencies"),
        ("window-starts-late", "mask", "spec.py", "layer >= self.window_from_layer", "layer > self.window_from_layer",
         "window_of"),
    ),
)  # fmt: skip

MUTANTS = _REFERENCE + _SHARED
