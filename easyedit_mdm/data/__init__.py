"""Benchmark files and what is asked of a model for each of their records."""
