"""The whole suite at work on this machine, to look at."""
