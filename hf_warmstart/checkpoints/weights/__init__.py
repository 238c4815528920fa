"""A model's weights, grown from files to files."""
