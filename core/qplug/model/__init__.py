"""What a model is made of, found without its weights."""
