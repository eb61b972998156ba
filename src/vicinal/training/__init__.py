"""Objectives, optimisation and the one loop."""
