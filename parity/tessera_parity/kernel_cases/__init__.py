"""Generated cases of the kernels: `<op>.py` here has a module-level `OP = KernelOp(...)`. See `case`."""
