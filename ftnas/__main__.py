"""``python -m ftnas``: the same as the command ``ftnas``."""

from ftnas.cli import main

main()
