"""The cases: each module's docstring says what is compared, why, and how to read it; ``run`` measures it."""
