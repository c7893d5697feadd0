"""What workers tell the driver: it shows it, keeps it in MLflow, and exports it."""
