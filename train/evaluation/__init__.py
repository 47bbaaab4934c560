"""What a model is worth while it trains: held-out losses, a listening set, warnings on the curves."""
