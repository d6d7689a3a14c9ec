"""Which kernels run at all on this GPU? One small call each, every call in a process of its own, so that a hang costs itself alone.

    python benchmarks/kernels/first_light.py [STEP ...] [--seconds 60] [--workers 8] [--dry]

Steps go from one instruction group to the next: what the first red one has and the ones before it had not is where to look. Each
compares with the plain implementation in float64 and in the same dtype, by the rule of the fuzzing (docs/kernels.md, section 2).
`--dry` takes tiny sizes on a CPU, in the emulator and the interpreter. Exit code: 0 all right, 1 some are not, 2 wrong arguments, 4 no GPU.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / room) for room in ("shared", "kernels", "parity")]

Tensors = Sequence[Any]
Check = Iterator[tuple[str, float]]
"""Names of outputs and their errors as shares of what is allowed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps side by side and print a line for each."""
    options = _options(arguments)
    unknown = [name for name in options.step if name not in STEPS]
    if unknown:
        print(f"step = {unknown[0]!r}: expected one of {', '.join(STEPS)}, because these are here", file=sys.stderr)
        return 2
    if options.inside:
        return _inside(options.step[0])
    if not (options.dry or Path("/dev/nvidiactl").exists()):
        print("GPU = none: expected one, because a kernel's first run is looked at; try --dry", file=sys.stderr)
        return 4
    for what in ("workers", "seconds"):
        if not getattr(options, what) > 0:
            print(
                f"{what} = {getattr(options, what)}: expected more than 0, because nothing runs otherwise",
                file=sys.stderr,
            )
            return 2
    names = options.step or list(STEPS)
    with ThreadPoolExecutor(options.workers) as pool:
        answers = pool.map(partial(_apart, seconds=options.seconds, dry=options.dry), names)
        red = [name for name, answer in zip(names, answers, strict=True) if not _print(name, *answer)]
    print(f"{len(names) - len(red)} of {len(names)} right" + (f"; first not: {red[0]}" if red else ""))
    return 1 if red else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="*", help=f"of {', '.join(STEPS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a step is taken for hung")
    parser.add_argument("--workers", type=int, default=8, help="steps at one time")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # this is the process of one step
    return parser.parse_args(arguments)


def _apart(name: str, *, seconds: float, dry: bool) -> tuple[bool, str, float]:
    """Run one step in a process; return whether it is right, what it said last, and its seconds."""
    environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "TESSERA_CUDA_EMULATE": "1", "CUDA_VISIBLE_DEVICES": ""}
    clock = time.perf_counter()
    command = [sys.executable, str(Path(__file__)), name, "--inside"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, f"hung: stopped after {seconds:.0f} s", seconds
    said = (done.stdout if done.returncode in (0, 1) and done.stdout else done.stderr).strip().splitlines()
    return done.returncode == 0, said[-1][:300] if said else f"exit code {done.returncode}", time.perf_counter() - clock


def _print(name: str, is_right: bool, said: str, seconds: float) -> bool:
    print(f"{'right' if is_right else 'WRONG':6} {name:22} {seconds:5.1f} s  {said}", flush=True)
    return is_right


def _inside(name: str) -> int:
    """Do one step in this process; the last line says the errors as shares of what is allowed."""
    found = list(STEPS[name]())
    print(", ".join(f"{what} {share:.2f}" for what, share in found))
    return 0 if all(share <= 1.0 for _, share in found) else 1  # NaN is not right either


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _size(gpu: int, cpu: int) -> int:
    return gpu if _device() == "cuda" else cpu


def _random(*shape: int, seed: int = 0) -> Any:
    import torch

    stream = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=stream).to(_device(), torch.bfloat16)


def _compare(
    kernel: Callable[..., Tensors], plain: Callable[..., Tensors], inputs: Tensors, *, names: str, length: int
) -> Check:
    """Yield how far each output of the kernel is off, by the rule of the fuzzing."""
    import torch

    from tessera_parity.kernel_budget import kernel_limit

    ours, usual = kernel(*inputs), plain(*inputs)
    truth = plain(*(x.double() if x.is_floating_point() else x for x in inputs))
    if _device() == "cuda":
        torch.cuda.synchronize()
    for name, found, other, exact in zip(names.split(), ours, usual, truth, strict=True):
        error = float((other.double() - exact.double()).abs().max())
        limit = kernel_limit(error, found.dtype, magnitude=float(exact.abs().max()), length=length)
        yield name, float((found.double() - exact.double()).abs().max()) / limit


# ---- steps ---------------------------------------------------------------------------------------------------------


def _compiler() -> Check:
    """NVRTC and the driver's bindings are there."""
    from cuda.bindings import driver, nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    yield f"NVRTC {major}.{minor}", 0.0
    if _device() == "cuda":
        yield f"driver {driver.cuDriverGetVersion()[1]}", 0.0


def _norm(room: str, *, backward: bool) -> Check:
    """RMSNorm; its backward is the first CUDA call of autograd's thread."""
    from importlib import import_module

    import torch

    from tessera_kernels.reference.rms_norm import rms_norm as plain

    def gradients(function: Any, x: Any, gain: Any, dy: Any) -> Tensors:
        leaves = [x.detach().requires_grad_(), gain.detach().requires_grad_()]
        found: Tensors = torch.autograd.grad(function(*leaves, eps=1e-6), leaves, dy)
        return found

    ours = import_module(f"tessera_kernels.{room}.rms_norm").rms_norm
    x, gain, dy = _random(37, 1024), _random(1024, seed=1), _random(37, 1024, seed=2)
    if backward:
        yield from _compare(
            partial(gradients, ours), partial(gradients, plain), (x, gain, dy), names="dx dgain", length=1024
        )
    else:
        functions = (lambda *given, f=f: (f(*given, eps=1e-6),) for f in (ours, plain))
        yield from _compare(*functions, (x, gain), names="y", length=1024)


def _attention(
    width: int, queries: int, keys: int, *, room: str = "cuda", heads: int = 1, kv_heads: int = 1, causal: bool = True,
    cut: tuple[int, ...] | None = None, overlap: int = 0, backward: bool = False,
) -> Check:  # fmt: skip
    """Attention of two sequences; `cut` is a configuration's numbers, `overlap` changes the chosen one's."""
    from importlib import import_module

    import torch

    from tessera_kernels.reference.flash_attention import flash_attention as plain

    module = import_module(f"tessera_kernels.{room}.flash_attention")
    options: dict[str, Any] = {}
    if cut:
        options["config"] = module.CudaConfig(*cut)
    elif overlap:
        options["config"] = module.choose_config(width, 90)._replace(overlap=overlap)

    def forward(function: Any, *leaves: Any, **given: Any) -> Tensors:
        return function(*leaves[:3], causal=causal, **given)  # type: ignore[no-any-return]

    def gradients(function: Any, *inputs: Any, **given: Any) -> Tensors:
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        found: Tensors = torch.autograd.grad(forward(function, *leaves, **given)[0], leaves, inputs[3])
        return found[::-1]  # dv comes of P alone, dk of dS too, dq of dS and the sums in global memory

    of, names = (gradients, "dv dk dq") if backward else (forward, "out lse")
    shapes = (
        (2, queries, heads, width),
        (2, keys, kv_heads, width),
        (2, keys, kv_heads, width),
        (2, queries, heads, width),
    )
    inputs = [_random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    yield from _compare(
        partial(of, module.flash_attention, **options), partial(of, plain), inputs, names=names, length=keys
    )


def _packed() -> Check:
    """Packed sequences; what lies after the last one is NaN."""
    import torch

    from tessera_kernels.cuda.flash_attention import flash_attention_varlen
    from tessera_kernels.reference.flash_attention import flash_attention as plain

    lengths = (_size(300, 70), 1, 0, _size(129, 33))
    used = sum(lengths)
    q, k, v = (_random(used + 9, 2, 64, seed=seed) for seed in range(3))
    for x in (q, k, v):
        x[used:] = torch.nan
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
    out, _ = flash_attention_varlen(q, k, v, starts, starts, longest_query=max(lengths), longest_key=max(lengths))
    for first, length in zip(starts.tolist(), lengths, strict=False):
        if length:
            one = slice(first, first + length)
            alone = (x[None, one] for x in (q, k, v))
            got = (out[None, one],)
            yield from _compare(
                lambda *_, got=got: got, lambda *x: plain(*x)[:1], list(alone), names=f"rows_{length}", length=length
            )
    yield "past_the_last", float(out[used:].abs().max())


def _graph() -> Check:
    """The forward replayed from a CUDA graph, and 200 times the same bits."""
    import torch

    from tessera_kernels.cuda.flash_attention import flash_attention

    q, k, v = (_random(2, _size(512, 40), 2, 128, seed=seed) for seed in range(3))
    first = flash_attention(q, k, v)[0]
    if _device() == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = flash_attention(q, k, v)[0]
        replayed.zero_()
        graph.replay()
        yield "replayed", 0.0 if torch.equal(replayed, first) else torch.inf
    again = (torch.equal(flash_attention(q, k, v)[0], first) for _ in range(_size(200, 2)))
    yield "repeated", 0.0 if all(again) else torch.inf


def _many_sequences() -> Check:
    """A packed backward of more (sequence, head) pairs than a grid's second dimension holds, two queries in each.

    Of one query and one key the gradients are 0, and what rounding makes of that has no scale to be held against.
    """
    import torch

    from tessera_kernels.reference.flash_attention import flash_attention as plain
    from tessera_kernels.triton.flash_attention import flash_attention_varlen as packed

    count = _size(70_000, 5)
    inputs = [_random(2 * count, 1, 16, seed=seed) for seed in range(4)]
    starts = 2 * torch.arange(count + 1, dtype=torch.int32, device=inputs[0].device)

    def ours(q: Any, k: Any, v: Any, dout: Any) -> Tensors:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = packed(*leaves, starts, starts, longest_query=2, longest_key=2)
        return torch.autograd.grad(out, leaves, dout)

    def usual(q: Any, k: Any, v: Any, dout: Any) -> Tensors:
        leaves = [x.detach().unflatten(0, (count, 2)).requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad(plain(*leaves)[0], leaves, dout.unflatten(0, (count, 2)))
        return [x.flatten(0, 1) for x in grads]

    yield from _compare(ours, usual, inputs, names="dq dk dv", length=2)


def _packed_weight(form: str, rows: int, splits: int) -> Check:
    """A product with packed weights: words from shared memory to operands in registers."""
    from tessera_kernels.cuda.quant_matmul import QuantConfig, choose_config, quant_matmul
    from tessera_kernels.reference.quant_matmul import quant_matmul as plain
    from tessera_parity.kernel_cases.quant_matmul import quantized

    outputs, width = _size(1000, 300), _size(2000, 300)
    weight = quantized(_random(outputs, width), form)
    config: QuantConfig = choose_config(rows, outputs, width)._replace(splits=splits)
    ours, usual = lambda x: (quant_matmul(x, weight, config=config),), lambda x: (plain(x, weight),)
    yield from _compare(ours, usual, (_random(rows, width, seed=1),), names="y", length=width)


def _distillation() -> Check:
    """Logits of two models in one launch, and the sum of d head over two chunks."""
    import torch

    from tessera_kernels.cuda.linear_distillation import linear_distillation
    from tessera_kernels.reference.linear_distillation import linear_distillation as plain

    rows, vocab = _size(600, 40), _size(3000, 300)
    shapes = ((rows, 256), (vocab, 256), (rows, 320), (vocab, 320))
    inputs = [_random(*shape, seed=seed) / 4 for seed, shape in enumerate(shapes)]
    labels = torch.arange(rows, device=inputs[0].device)

    def gradients(function: Any, *given: Any, **options: Any) -> Tensors:
        leaves = [x.detach().requires_grad_() for x in given[:2]]
        loss, _ = function(*leaves, *given[2:], labels, divergence="generalized_jsd", label_weight=0.3, **options)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    ours = partial(gradients, linear_distillation, chunk_bytes=rows // 2 * 10 * (vocab + 64))
    yield from _compare(ours, partial(gradients, plain), inputs, names="loss dstudent dhead", length=vocab)


def _e4m3() -> Check:
    """Products of 8-bit numbers: 32 terms an instruction."""
    from tessera_kernels.cuda.fp8_matmul import fp8_matmul
    from tessera_kernels.fp8_scaling import quantize_fp8

    codes_a, scale_a = quantize_fp8(_random(_size(1000, 130), 1000), scaling="row")
    codes_b, scale_b = quantize_fp8(_random(_size(1000, 264), 1000, seed=1), scaling="row")
    given = [codes_a.float() * scale_a[:, None], codes_b.float() * scale_b[:, None]]

    def plain(a: Any, b: Any) -> Tensors:
        product = a @ b.t()
        return (product.bfloat16() if product.dtype != given[0].double().dtype else product,)

    ours = fp8_matmul(codes_a, codes_b, scale_a, scale_b, scaling="row")
    yield from _compare(lambda *_: (ours,), plain, given, names="c", length=1000)


def _pages(*, queries: int, keys: int) -> Check:
    """One row of a page table: a decode (queries = 0), or a prefill whose few programs are split over keys."""
    import torch

    from tessera_kernels.reference import paged_attention as plain
    from tessera_kernels.triton import paged_attention as ours

    page_size, device = 16, _device()
    count = -(-keys // page_size)
    table = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device, torch.int32)[None]
    lengths = torch.tensor([keys], dtype=torch.int32, device=device)
    starts = torch.tensor([0, queries], dtype=torch.int32, device=device)
    pages = [_random(count, page_size, 2, 128, seed=seed) for seed in (1, 2)]

    def of(module: Any, q: Any, k: Any, v: Any) -> Tensors:
        if queries == 0:
            return (module.paged_attention(q, k, v, table, lengths),)
        return (module.paged_prefill(q, k, v, table, lengths, starts, longest_query=queries),)

    inputs = [_random(max(1, queries), 8, 128), *pages]
    yield from _compare(partial(of, ours), partial(of, plain), inputs, names="out", length=keys)


def _sample() -> Check:
    """Ids drawn with every filter on, against float64's."""
    import torch

    from tessera_kernels.reference.sample import sample as plain
    from tessera_kernels.triton.sample import sample

    logits = _random(4, _size(131_072, 700)).float()
    uniforms = torch.tensor([0.01, 0.4, 0.77, 0.999], device=logits.device)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    found, truth = sample(logits, uniforms, **options), plain(logits.double(), uniforms, **options)
    yield "ids", 0.0 if torch.equal(found.long(), truth.long()) else torch.inf


STEPS: dict[str, Callable[[], Check]] = {
    "compiler": _compiler,
    "cuda_norm": partial(_norm, "cuda", backward=False),
    "cuda_norm_backward": partial(_norm, "cuda", backward=True),
    "sm80": lambda: _attention(64, 64, 64, cut=(80, 4, 64, 2)),
    "one_box": lambda: _attention(64, 64, 128, causal=False),
    "panels": lambda: _attention(128, _size(512, 130), _size(512, 140), heads=4, kv_heads=2),
    "three_groups": lambda: _attention(64, _size(1000, 200), _size(1000, 200), heads=2, kv_heads=2),
    "narrow_16": lambda: _attention(16, 100, 100),
    "narrow_48": lambda: _attention(48, 100, 100),
    "wide_144": lambda: _attention(144, 100, 100),
    "wide_192": lambda: _attention(192, 100, 100),
    "wide_256": lambda: _attention(256, 100, 100),
    "packed": _packed,
    "backward_one_box": lambda: _attention(128, 64, 128, causal=False, overlap=2, backward=True),
    "backward_overlap_1": lambda: _attention(128, 64, 128, causal=False, overlap=1, backward=True),
    "backward_80": lambda: _attention(80, _size(1000, 140), _size(1000, 150), heads=4, kv_heads=2, backward=True),
    "packed_few_w8": lambda: _packed_weight("w8", 1, 1),
    "packed_few_w4": lambda: _packed_weight("w4g64", 16, 1),
    "packed_w8": lambda: _packed_weight("w8", 60, 1),
    "packed_w8_split": lambda: _packed_weight("w8g64", _size(300, 130), 4),
    "packed_w4": lambda: _packed_weight("w4g128", _size(300, 130), 1),
    "linear_products": _distillation,
    "e4m3": _e4m3,
    "graph": _graph,
    "triton_norm": partial(_norm, "triton", backward=True),
    "triton_forward": lambda: _attention(128, _size(512, 40), _size(512, 40), room="triton", heads=4, kv_heads=2),
    "triton_attention": lambda: _attention(
        128, _size(512, 40), _size(512, 40), room="triton", heads=4, kv_heads=2, backward=True
    ),
    "triton_sequences": _many_sequences,
    "decode": lambda: _pages(queries=0, keys=_size(5000, 70)),
    "split_prefill": lambda: _pages(queries=_size(300, 20), keys=_size(5000, 70)),
    "sample": _sample,
}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; nothing is kept", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for steps that may hang; the key ends them too
