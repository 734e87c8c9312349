"""Generated gRPC stubs; `scripts/generate_stubs` makes them from proto/, nobody edits them."""
