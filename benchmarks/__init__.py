"""Measurements that anyone can repeat: ``python -m benchmarks.extract --help``."""
