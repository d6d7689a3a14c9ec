"""Kernels, one file name per operation. Importing this package imports nothing, so that it is safe where no compiler is."""
