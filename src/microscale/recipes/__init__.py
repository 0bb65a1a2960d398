"""The whole model: which layer gets which format and method. The only room that changes a model."""
