"""``lianlian batch``: refunds from a file."""
