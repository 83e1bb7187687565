"""The predictive: a posterior and new inputs in, distributions of the model's outputs out."""
