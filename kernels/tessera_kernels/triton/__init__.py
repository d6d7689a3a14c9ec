from tessera_kernels.checks import is_interpreting

if is_interpreting():
    from tessera_kernels.triton._interpreter import round_to_nearest

    round_to_nearest()
