"""What adapters add to graphs and programs."""
