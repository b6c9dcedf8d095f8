"""Benchmarks: everything that is compared is measured in one run, interleaved, on the same prompts."""
