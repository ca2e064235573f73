"""The bundled tiny text-to-image model: its drawn world, and one module per training stage."""
