"""``python -m bench.evidence``: see bench.evidence.command."""

from bench.evidence.command import main

main()
