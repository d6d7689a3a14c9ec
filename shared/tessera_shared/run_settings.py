"""What decides a training run, as flat data: the flags of `tessera train`, written once into the run directory."""

from dataclasses import dataclass

from tessera_shared.errors import SpecError
from tessera_shared.numerics import Numerics, numerics_for
from tessera_shared.objectives import AdamWOptions, DistilOptions, Divergence, Objective, TopKForm
from tessera_shared.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The flags that a run's result depends on. Backend, device and what is printed are not among them."""

    preset: str | None = "nano"  # shape of the student; None with `model`
    model: str | None = None  # a model directory to start from, absolute
    data: tuple[str, ...] = ()  # files and folders, absolute; none = the standard library
    tokenizer: str | None = (
        None  # a tokenizer.json, absolute; None = the teacher's, the model's, or trained on the data
    )
    steps: int = 200  # updates of the whole run; may be raised when it is resumed
    batch_size: int = 8  # rows of an update
    seq_len: int = 256  # tokens of a row
    accumulate: int = 1  # micro-batches of an update, divides batch_size
    lr: float = 3e-3  # peak of the schedule
    schedule: str = "cosine"
    warmup: int | None = None  # updates; None = a twentieth of `steps`
    decay: int | None = None  # updates (wsd); None = a fifth of `steps`
    weight_decay: float = 0.1
    dtype: str = "float32"
    seed: int = 0  # initial weights and sample order
    teacher: str | None = None  # a model directory, absolute
    distil: str = "forward_kl"  # only with a teacher, like the five below
    temperature: float = 1.0
    hard_weight: float = 0.0
    beta: float = 0.5
    alpha: float = 0.1
    top_k: int | None = None
    top_k_form: str = "tail"  # only with top_k

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} = {getattr(self, name)}: expected >= 1, because it is a count; try 1")
        if self.batch_size % self.accumulate:
            raise SpecError(
                f"accumulate = {self.accumulate}: expected a divisor of batch_size = {self.batch_size}, because "
                "micro-batches are of one size; try 1"
            )
        if not 0 <= self.seed < 2**64:
            raise SpecError(f"seed = {self.seed}: expected 0 to 2**64 - 1, because it is 64 bits; try 0")
        if self.temperature <= 0:
            raise SpecError(
                f"temperature = {self.temperature}: expected > 0, because logits are divided by it; try 1.0"
            )


def numerics_of(settings: RunSettings) -> Numerics:
    """Return the numerics policy."""
    return numerics_for(settings.dtype)


def schedule_of(settings: RunSettings) -> Schedule:
    """Return the learning-rate schedule, decaying to zero."""
    warmup = settings.steps // 20 if settings.warmup is None else settings.warmup
    decay = 0
    if settings.schedule == "wsd":
        decay = max(1, settings.steps // 5) if settings.decay is None else settings.decay
    elif settings.decay is not None:
        decay = settings.decay  # Schedule says why not
    return Schedule(
        kind=settings.schedule,
        peak=settings.lr,
        total_steps=settings.steps,
        warmup_steps=warmup,
        decay_steps=decay,
    )


def options_of(settings: RunSettings) -> AdamWOptions:
    """Return AdamW's options. SpecError for a decay that is not a finite number from 0."""
    if not 0.0 <= settings.weight_decay < float("inf"):
        raise SpecError(
            f"weight_decay = {settings.weight_decay}: expected a finite number >= 0, because weights shrink by it; "
            "try 0.1"
        )
    return AdamWOptions(weight_decay=settings.weight_decay)


def objective_of(settings: RunSettings) -> Objective:
    """Return what is minimized: cross-entropy, or with a teacher the divergence that the settings name."""
    if settings.teacher is None:
        return Objective()
    form = TopKForm.FULL
    if settings.top_k is not None:
        form = TopKForm(_one_of("top_k_form", settings.top_k_form, [form.value for form in TopKForm]))
    return Objective(
        distil=DistilOptions(
            divergence=Divergence(_one_of("distil", settings.distil, [divergence.value for divergence in Divergence])),
            temperature=settings.temperature,
            hard_weight=settings.hard_weight,
            beta=settings.beta,
            alpha=settings.alpha,
            top_k=settings.top_k,
            top_k_form=form,
        )
    )


def check_settings(settings: RunSettings) -> None:
    """Raise SpecError for anything that a settings' schedule, policy, optimizer or objective refuses."""
    numerics_of(settings)
    schedule_of(settings)
    options_of(settings)
    objective_of(settings)


def _one_of(name: str, value: str, known: list[str]) -> str:
    if value not in known:
        raise SpecError(
            f"{name} = {value!r}: expected one of {', '.join(known)}, because each is a written formula; try {known[0]}"
        )
    return value
