"""Methods: one file for each published one, pure functions; chains of them by name or by words."""
