"""What tests and benchmarks share: the declared cases, the error budget and the contract check."""
