"""Codebooks: which few levels stand for the values of a derivative."""
