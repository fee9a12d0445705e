"""What runs in a worker, on any platform."""
