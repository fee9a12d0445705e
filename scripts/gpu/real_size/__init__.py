"""What `check_real_size.py` checks: pools of many GiB, rows in them, and float64 judges."""
