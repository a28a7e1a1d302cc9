"""Test programs that kill, suspend and fail over real processes. Each takes its size by option."""
