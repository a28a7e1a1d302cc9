"""``lianlian sandbox`` and ``lianlian demo``: the fake gateway on a socket or in another process."""
