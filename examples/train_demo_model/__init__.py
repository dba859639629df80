"""Trains the demo model in examples/demo_model."""
