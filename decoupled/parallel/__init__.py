"""Modules that learn at the same time in several processes."""
