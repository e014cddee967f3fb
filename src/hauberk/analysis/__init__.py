"""What the hidden states of a model say: twins, gaps, and where refusal lives."""
