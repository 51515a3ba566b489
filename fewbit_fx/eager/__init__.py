"""Few-bit activations in eager pipelines: what the drop-in functions and modules run."""
