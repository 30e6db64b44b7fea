"""Command-line tools: ``python -m mcibi_d2.tools.<name> --help``."""
