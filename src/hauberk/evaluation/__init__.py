"""What a defense does: responses, outcomes, metrics with their uncertainty, choices."""
