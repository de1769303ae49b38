"""Codes that are looked up in a table: one that everybody knows, or one stored with the weights."""
