"""Benchmarks for asv: `make bench` runs each once on the working tree.

A benchmark stores what it computed in `self.result`, which tests/test_benchmarks.py compares to float64
arithmetic.
"""
