"""Residual additions of any network: found by data flow, measured, left out."""
