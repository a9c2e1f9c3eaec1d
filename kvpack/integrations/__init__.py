"""Adapters to other libraries (transformers); nothing below imports this package."""
