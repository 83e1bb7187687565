"""The evidence: fit and curvature in, marginal likelihood and tuned hyperparameters out."""
