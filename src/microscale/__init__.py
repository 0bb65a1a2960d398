"""microscale: language models in microscaling (MX) formats."""

__version__ = "0.1.0"
