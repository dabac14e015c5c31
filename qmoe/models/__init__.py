"""A transformers model whose blocks come and go, and the shapes of its experts."""
