"""The measured programs: each is run as ``python -m benchmarks.programs.NAME JOB`` and prints one JSON object.

None may import anything that its own environment has no need of: some run with four dependencies only.
"""
