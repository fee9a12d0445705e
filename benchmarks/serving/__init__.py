"""Parts of benchmarks/serving/measure.py: the servers, the workload and the tables."""
