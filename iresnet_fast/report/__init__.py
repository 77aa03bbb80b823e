"""Measurements put into tables, figures and pages."""
