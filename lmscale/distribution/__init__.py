"""Strategies and collectives."""
