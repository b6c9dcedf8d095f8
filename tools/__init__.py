"""Offline tools: the demo pair, the draft-head trainer, the benchmarks."""
