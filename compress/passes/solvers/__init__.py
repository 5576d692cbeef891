"""Solvers that several passes share."""
