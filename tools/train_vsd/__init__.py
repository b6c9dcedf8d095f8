"""Trains, calibrates and evaluates draft heads."""
