"""A failing case of a kernel as a program. Text alone: neither torch nor Hypothesis is needed to write it."""


def repro_lines(op: str, case: str, device: str = "cpu") -> list[str]:
    """Return a program that judges one case by itself."""
    interpret = ["import os", "", 'os.environ["TRITON_INTERPRET"] = "1"', ""] if device == "cpu" else []
    return [
        f'"""Repro: kernel {op} breaks a promise in this case. Exit status: 1 while it does."""',
        "",
        *interpret,
        "import sys",
        "",
        "from tessera_parity.kernel_fuzz import kernel_errors",
        "from tessera_parity.kernel_judge import judge",
        f"from tessera_parity.kernel_cases import {op} as cases",
        "",
        'kernels = [module for name, module in sorted(sys.modules.items()) if name.startswith("tessera_kernels.")]',
        "names = {name: value for module in kernels for name, value in vars(module).items()} | vars(cases)",
        f"case = eval({case!r}, names)",
        "try:",
        f"    judged = judge(cases.OP, case, device={device!r}, repeats=2, rows=3)",
        "except kernel_errors() as error:",
        '    print(f"observed: {error}")',
        "    sys.exit(1)",
        'print(f"the case passes here, at {judged.observed:.3g} of its limit ({judged.where})")',
    ]
