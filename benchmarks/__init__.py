"""What the program costs, each claim measured beside its reference: `python -m benchmarks`."""
