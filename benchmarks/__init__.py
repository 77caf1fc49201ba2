"""Measurements: each entry writes benchmarks/results/NAME.json, tables.py renders them."""
