"""The readable PyTorch definition of every op: the oracle of the tests and the 'eager' of the benchmarks."""
