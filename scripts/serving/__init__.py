"""Parts of scripts/bench_serving.py: the servers, the workload and the tables."""
