"""Settings of the whole suite: the model, and a TOML file for each place it runs in."""
