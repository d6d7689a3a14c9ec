"""Training and generation built of kernels: forward, losses, AdamW, decoding. What it computes is the plain model's.

Nothing here has a twin; subject `kernels` of parity holds it against the oracle.
"""
