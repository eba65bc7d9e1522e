"""The Mixture-of-Experts: building experts, their routers, and the parts that are plugged in for training."""
