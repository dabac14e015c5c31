"""Words -> integers, dense weights, or a product that never writes the weights down."""
