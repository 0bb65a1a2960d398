"""The decoder layers of a model, run and measured one at a time: for calibration, methods that learn, and planning."""
