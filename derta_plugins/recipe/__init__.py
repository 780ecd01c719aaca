"""One host-neutral recipe of a training run, and the config that each host takes for it. Imports no host."""
