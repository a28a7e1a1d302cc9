"""Test programs that kill, suspend and fail over real processes. Options set their size."""
