"""Samplers as tables: noise schedules, sigmas, solvers, guidance, noise."""
