"""The expert store: owns every routed expert, packed, in page-locked shared host memory. Uses no GPU."""
