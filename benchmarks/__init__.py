"""Benchmarks: latency beside the peers, and reports."""
