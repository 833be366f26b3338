"""Metrics, health and status of the running programs, on this machine's loopback."""
