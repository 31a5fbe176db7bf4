"""Records rendered for terminals and notebooks."""
