"""Integrations: one module for each framework, which only its users import."""
