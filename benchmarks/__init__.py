"""Benchmarks: latency beside the peers, and reports."""

from sdrt.runtime.system.telemetry import switch_telemetry_off

switch_telemetry_off()  # before any module here imports a library that has one
