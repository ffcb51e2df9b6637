"""TensorRT: engines that are built for one GPU, and kept."""
