"""What a model is made of: one record for each architecture family, and what it says about a model at hand."""
