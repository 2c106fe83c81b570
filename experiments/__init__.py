"""Programs that train networks with `anact_jax` and report what they find."""
