"""The codec: codes of levels, their bit planes, and back."""
