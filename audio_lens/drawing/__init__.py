"""Figures: results and clips as plotly and matplotlib draw them. It computes nothing."""
