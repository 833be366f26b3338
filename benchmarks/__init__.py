"""What the suite's speed is, measured on this machine."""
