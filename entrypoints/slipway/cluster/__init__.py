"""From a client to a cluster: what `slipway submit` renders, sends and asks. Nothing of it runs on the cluster."""
