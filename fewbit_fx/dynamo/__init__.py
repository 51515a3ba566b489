"""The way in from torch.compile, and what it leaves for a report."""
