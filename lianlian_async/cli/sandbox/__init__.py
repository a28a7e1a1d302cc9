"""``lianlian sandbox`` and ``lianlian demo``: the fake gateway, served on a socket."""
