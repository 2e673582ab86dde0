"""How the probe set is made: a maintainer's tool."""
