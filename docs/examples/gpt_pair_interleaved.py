"""The pair of gpt_pair.py with a planted bug on the right; `parity check` must find it and name `attention.q_rope`."""

import gpt_jax_interleaved
from gpt_pair import frameworks, inputs, left, params, to_right

right = gpt_jax_interleaved.forward

__all__ = ["frameworks", "inputs", "left", "params", "right", "to_right"]
