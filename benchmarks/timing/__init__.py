"""Timings of the package's kernels; see benchmarks/timing/gpu_kernels.py."""
