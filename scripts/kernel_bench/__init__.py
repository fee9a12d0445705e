"""Timings of the package's kernels; see scripts/bench_kernels.py."""
