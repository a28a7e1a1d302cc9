"""The measured programs: each is run as ``python -m benchmarks.programs.NAME JOB`` and prints one JSON object.

A program imports only what its own environment has: some run with the four dependencies only.
"""
