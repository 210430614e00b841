"""Where am I in the cluster, and how are the workers started there."""
