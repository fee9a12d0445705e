"""Quality benchmark: tasks, metrics, engines and reports behind scripts/eval_quality.py."""
