"""What is thrown at a model."""
