"""Quality benchmark: tasks, metrics, engines and reports behind benchmarks/quality/evaluate.py."""
