"""Reports: what was coded, what was not and why, for people."""
