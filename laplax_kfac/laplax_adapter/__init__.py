"""The adapter: the only folder that knows laplax; it registers our curvature types there."""
