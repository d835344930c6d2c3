"""Taking a trained run out of coatkit."""
