"""``python -m microscale``."""

from microscale.cli import main

main()
