"""What a trained run knows and costs: looked at, measured and drawn."""
