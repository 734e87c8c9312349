"""What both processes agree on: formats, layouts, wires and words. Imports neither of them."""
