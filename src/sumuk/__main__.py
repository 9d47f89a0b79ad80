"""``python -m sumuk``."""

from sumuk.cli.main import main

main()
