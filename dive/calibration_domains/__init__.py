"""Texts of the calibration domains."""
