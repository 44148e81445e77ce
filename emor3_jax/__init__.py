"""EMO-R3 in JAX: reflective reinforcement learning for visual emotion reasoning."""
