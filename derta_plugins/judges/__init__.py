"""Judges by rule: what a response refuses, and what harmful content it holds."""
