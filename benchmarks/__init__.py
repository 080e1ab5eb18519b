"""What opsguard costs, measured. ``python -m benchmarks --help``."""
