"""Every measurement of the project: ``python -m benchmarks``."""
