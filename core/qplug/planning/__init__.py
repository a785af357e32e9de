"""What a model would need on GPUs under each scheme, found from headers alone, without torch."""
