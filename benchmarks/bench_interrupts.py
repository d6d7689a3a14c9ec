"""Does Ctrl-C at any moment end a command with 130 and one line? Presses it at random moments of real runs and counts.

    python benchmarks/bench_interrupts.py --runs 20

A run is red when it prints a traceback, ends with another code, or is still there after --patience seconds: Python drops what is
raised inside a garbage collector's callback, and such a run goes on as if nobody had pressed. The first moments of a process,
before a line of ours runs, are Python's own, so --after waits them out.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(sys.executable).parent
TRAIN = "tessera train run --data text.txt --preset nano --seq-len 16 --batch-size 2 --steps 100000 --backend"
COMMANDS = {
    "train-torch": (f"{TRAIN} torch", 14.0),
    "train-jax": (f"{TRAIN} jax", 14.0),
    "parity": ("parity run files text ops --quick --only-half torch --workers 1 --report run", 5.0),
}
"""Command -> what runs, and the seconds within which the key is pressed."""


def main() -> int:
    """Print a line for each command; 1 when a run was red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="*", help=f"of {', '.join(COMMANDS)}; default: all")
    parser.add_argument("--runs", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--after", type=float, default=0.5, help="seconds before which no key is pressed")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds after which a run is taken for deaf")
    given = parser.parse_args()
    for name in given.command:
        if name not in COMMANDS:
            parser.error(f"command = {name!r}: expected one of {', '.join(COMMANDS)}, because these are here")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would inherit that it is ignored
    moments, red = random.Random(given.seed), 0
    for name in given.command or COMMANDS:
        line, most = COMMANDS[name]
        faults = [
            fault
            for _ in range(given.runs)
            if (fault := press(line, given.after + moments.random() * (most - given.after), given.patience))
        ]
        print(f"{name}: {given.runs - len(faults)} of {given.runs} right", *faults, sep="\n  ", flush=True)
        red += len(faults)
    return 1 if red else 0


def press(line: str, moment: float, patience: float) -> str:
    """Run a command in an empty folder, press Ctrl-C after `moment` seconds, and return what was wrong."""
    program, *arguments = line.split()
    with tempfile.TemporaryDirectory(prefix="tessera-interrupts-") as folder:
        (Path(folder) / "text.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 200)
        with subprocess.Popen(
            [str(SCRIPTS / program), *arguments], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        ) as process:  # fmt: skip
            time.sleep(moment)
            had_ended = process.poll() is not None
            process.send_signal(signal.SIGINT)
            try:
                out, err = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                process.kill()
                return f"deaf: pressed after {moment:.2f} s, still there {patience:.0f} s later"
    if "Traceback" in out + err:
        return f"a traceback: pressed after {moment:.2f} s: {err.strip().splitlines()[0]}"
    if process.returncode != 130 and not had_ended:
        return f"exit code {process.returncode}: pressed after {moment:.2f} s"
    return ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
