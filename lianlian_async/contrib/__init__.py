"""One module for each framework that services are built with; each is imported only by who uses it."""
