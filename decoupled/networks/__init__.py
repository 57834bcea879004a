"""The networks that DGL trains: modules, auxiliary networks, and any model cut into modules."""
