"""How factors begin: by a wanted variance, as other libraries draw them, from a seed."""
