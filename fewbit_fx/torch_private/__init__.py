"""Every use of torch's private API, each with its reason, by subject. Checked on torch 2.11, 2.13 and 2.15.

Nothing else in fewbit-fx imports from a ``torch._*`` module or reads a private attribute of torch: a test says so.
"""
