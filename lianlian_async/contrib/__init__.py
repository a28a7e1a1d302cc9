"""Integrations: one module for each framework. Import the one that you use."""
