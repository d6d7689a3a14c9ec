"""`ModelSpec`: a family of decoders, described once for both halves.

Pre-norm RMSNorm, grouped-query attention, rotary positions (half-split layout), SwiGLU. What differs between Llama,
Mistral, Qwen2 and Qwen3 is a field here; `hf_config.py` maps the fields to Hugging Face's `config.json` and back.
"""

from dataclasses import dataclass, field

from tessera_shared.errors import SpecError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its context-extension rules."""

    theta: float = 10000.0  # base of the geometric series of wavelengths
    scaling: str = "none"  # none | linear | llama3 | yarn
    factor: float = 1.0  # context extension factor (linear, llama3, yarn)
    original_max_positions: int | None = None  # context before extension (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original / low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original / high are kept
    beta_fast: float = 32.0  # yarn: rotations above which a dimension is kept
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is interpolated
    attention_factor: float | None = None  # yarn: scale of cos and sin; None = 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, DeepSeek form: with mscale_all_dim gives the attention factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self) -> None:
        if self.scaling not in ROPE_SCALINGS:
            raise SpecError(
                f"rope.scaling = {self.scaling!r}: expected one of {', '.join(ROPE_SCALINGS)}, because these are the rules "
                "that both halves implement; try 'none'"
            )
        if not self.theta > 0.0:
            raise SpecError(f"rope.theta = {self.theta}: expected > 0, because it is the base of a power; try 10000.0")
        if self.scaling != "none" and not self.factor >= 1.0:
            raise SpecError(
                f"rope.factor = {self.factor}: expected >= 1, because it extends the context; try factor=1.0"
            )
        if self.scaling in ("llama3", "yarn") and not self.original_max_positions:
            raise SpecError(
                f"rope.original_max_positions = {self.original_max_positions}: expected a positive length, because "
                f"{self.scaling} scaling is relative to the context before extension; try the pre-training context"
            )
        if self.scaling == "yarn" and not self.theta > 1.0:
            raise SpecError(
                f"rope.theta = {self.theta}: expected > 1 with yarn, because dimensions are found by a logarithm to that base; "
                "try 10000.0"
            )
        if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise SpecError(
                f"rope.high_freq_factor = {self.high_freq_factor}, low_freq_factor = {self.low_freq_factor}: expected "
                "high > low, because the band between them is interpolated; try 4.0 and 1.0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that decides a model's shape and arithmetic. Frozen; change it with `dataclasses.replace`."""

    architecture: str = "llama"  # whose config.json and which biases: llama | mistral | qwen2 | qwen3
    vocab_size: int  # V, rows of the embedding (as stored, padding rows included)
    num_layers: int  # L
    width: int  # D
    ffn_width: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K, divides N
    head_width: int  # H, even; free of D / N
    max_positions: int  # positions 0 .. max_positions - 1 are legal
    norm_eps: float = 1e-6  # added to the mean square, inside the root
    rope: RopeSpec = field(default_factory=RopeSpec)
    qkv_bias: bool = False  # biases on q, k, v projections (Qwen2: always)
    output_bias: bool = False  # bias on the attention output projection
    mlp_bias: bool = False  # biases on gate, up, down
    qk_norm: bool = False  # RMSNorm over each head of q and k before rotation (Qwen3: always)
    sliding_window: int | None = None  # a query sees this many positions, itself included; None = all earlier
    window_from_layer: int = 0  # layers before this one attend to everything (Qwen's max_window_layers)
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    logit_softcap: float | None = None  # cap * tanh(logits / cap)
    tie_embeddings: bool = False  # the unembedding is the embedding
    init_std: float = 0.02  # standard deviation of initial matrices
    real_vocab_size: int | None = None  # ids at or above this are padding rows; None = no padding
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise SpecError(
                f"architecture = {self.architecture!r}: expected one of {', '.join(ARCHITECTURES)}, because only these "
                "families have a tensor table; try 'llama'"
            )
        for name in ("vocab_size", "num_layers", "width", "ffn_width", "num_heads", "num_kv_heads", "head_width"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} = {getattr(self, name)}: expected >= 1, because it is a size; try 1 or more")
        if self.max_positions < 1:
            raise SpecError(f"max_positions = {self.max_positions}: expected >= 1, because it is a length; try 512")
        if self.num_heads % self.num_kv_heads:
            raise SpecError(
                f"num_heads = {self.num_heads}, num_kv_heads = {self.num_kv_heads}: expected heads that divide evenly "
                f"into groups, because each key/value head serves num_heads / num_kv_heads queries; try "
                f"num_kv_heads={_largest_divisor(self.num_heads, self.num_kv_heads)}"
            )
        if self.head_width % 2:
            raise SpecError(
                f"head_width = {self.head_width}: expected an even number, because rotary positions turn pairs of "
                f"dimensions; try {self.head_width + 1}"
            )
        if not self.norm_eps >= 0.0:
            raise SpecError(f"norm_eps = {self.norm_eps}: expected >= 0, because it is added under a root; try 1e-6")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise SpecError(
                f"sliding_window = {self.sliding_window}: expected >= 1 or None, because a query always sees itself; "
                "try None"
            )
        for name in ("attention_softcap", "logit_softcap"):
            cap = getattr(self, name)
            if cap is not None and not cap > 0.0:
                raise SpecError(f"{name} = {cap}: expected > 0 or None, because scores are divided by it; try None")
        if self.real_vocab_size is not None and not 0 < self.real_vocab_size <= self.vocab_size:
            raise SpecError(
                f"real_vocab_size = {self.real_vocab_size}, vocab_size = {self.vocab_size}: expected 0 < real <= stored, "
                "because padding only adds rows; try None"
            )

    @property
    def group_size(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of a layer, or None where the layer attends to everything before it."""
        return self.sliding_window if layer >= self.window_from_layer else None


def _largest_divisor(number: int, at_most: int) -> int:
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)
