"""Fuzz one kernel in a process of its own and print what came of it, one JSON object a line.

    python -m tessera_parity.kernel_worker OP --device cpu --seed 0 --lane default

A crash (an illegal memory access, a compiler that dies) then takes no other kernel's answer with it, and the line `at`
says in which case it was. On a CPU the interpreter is switched on before triton is imported.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

EFFORTS: dict[tuple[str, str], dict[str, float]] = {
    ("cpu", "quick"): {"cases": 4, "seconds": 3, "example_seconds": 10, "repeats": 1, "rows": 2, "bug_seconds": 6},
    ("cpu", "default"): {"cases": 60, "seconds": 5, "example_seconds": 90, "repeats": 1, "rows": 3, "bug_seconds": 8},
    ("cpu", "full"): {"cases": 300, "seconds": 90, "example_seconds": 300, "repeats": 2, "rows": 3, "bug_seconds": 30},
    ("cuda", "quick"): {"cases": 20, "seconds": 20, "example_seconds": 60, "repeats": 20, "rows": 3, "bug_seconds": 10},
    ("cuda", "default"): {
        "cases": 120, "seconds": 45, "example_seconds": 120, "repeats": 200, "rows": 5, "bug_seconds": 20,
    },
    ("cuda", "full"): {
        "cases": 400, "seconds": 150, "example_seconds": 400, "repeats": 200, "rows": 9, "bug_seconds": 30,
    },
}  # fmt: skip
"""How hard one op is looked at, by kind of device and lane; seconds as `kernel_fuzz.clock_of` counts them."""

CONFIG_SECONDS = {"quick": 0.001, "default": 60.0, "full": 240.0}
"""For every configuration over the examples, on a GPU; each runs once whatever this says."""


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0 whenever a result was printed, 3 when the device was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lane", default="default", choices=("quick", "default", "full"))
    parser.add_argument("--cases", type=int, help="generated cases at most")
    parser.add_argument("--no-bugs", action="store_true", help="plant nothing")
    parser.add_argument(
        "--bugs-after", type=int, default=0, metavar="N", help="plant bugs N + 1 and on; with N > 0 nothing else"
    )
    options = parser.parse_args(arguments)
    if options.bugs_after < 0:
        parser.error(f"--bugs-after = {options.bugs_after}: expected 0 or more, because bugs are counted from 1; try 0")
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    return _work(options, _say)


def _work(options: argparse.Namespace, say: Callable[[str, Any], None]) -> int:
    import torch

    from tessera_parity.kernel_fuzz import Effort, fuzz, plant_bugs
    from tessera_parity.kernel_judge import DeviceLost
    from tessera_parity.kernel_planting import load_op
    from tessera_parity.processes import settle_torch

    settle_torch()
    matmul = torch.backends.cuda.matmul  # the plain implementation's error is a limit: it must not be a loose one
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    numbers = dict(EFFORTS[options.device.partition(":")[0], options.lane])
    if options.device != "cpu":
        numbers["config_seconds"] = CONFIG_SECONDS[options.lane]
    if options.cases is not None:
        numbers["cases"] = options.cases
    effort, op = Effort(**numbers), load_op(options.op)  # type: ignore[arg-type]

    def at(line: str) -> None:
        say("at", line)

    try:
        if options.bugs_after == 0:
            fuzzed = fuzz(op, device=options.device, seed=options.seed, effort=effort, say=at)
            say("fuzzed", asdict(fuzzed))
            if fuzzed.failure or options.no_bugs:
                return 0
        for bug in plant_bugs(
            op, device=options.device, seed=options.seed, effort=effort, say=at, after=options.bugs_after
        ):
            say("bug", asdict(bug))
    except DeviceLost as error:
        say("lost", str(error))
        return 3
    return 0


def _say(kind: str, what: Any) -> None:
    print(json.dumps({"kind": kind, "what": what}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
