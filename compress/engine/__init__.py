"""Runs a plan stage by stage."""
