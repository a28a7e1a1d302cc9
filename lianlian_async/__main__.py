"""``python -m lianlian_async`` is the command ``lianlian``."""

from .cli import main

if __name__ == "__main__":  # the demo's gateway process imports this file again
    main()
