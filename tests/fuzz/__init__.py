"""Random networks, written as programs, against the dense curvature by reverse mode."""
