"""``python -m lianlian_async`` is the command ``lianlian``."""

from .cli import main

if __name__ == "__main__":
    main()
