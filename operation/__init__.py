"""What every program tells those who run it, on this machine's loopback: metrics, health and status."""
