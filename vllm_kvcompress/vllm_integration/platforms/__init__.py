"""What really differs between devices; everything else is shared."""
