"""What runs beside the product: local servers for tests, benchmarks and development. Not part of the package."""
