"""Kernels in CUDA C++, for sm_90a and sm_80. Importing this package imports nothing; a kernel is compiled when it is
first launched, or beforehand by `python -m tessera_kernels.cuda.build`."""
