"""The harness: what is measured, and the processes that are measured."""
