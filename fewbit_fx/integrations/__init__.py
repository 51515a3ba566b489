"""Callbacks for the trainers of other libraries, which are imported with the module that needs them."""
