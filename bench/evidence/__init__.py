"""Evidence: memory, speed, error of the gradient and convergence of every method on models and data that people use."""
