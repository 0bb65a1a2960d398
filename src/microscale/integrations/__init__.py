"""Adapters to transformers; other libraries follow."""
