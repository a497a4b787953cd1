"""What a training run needs and how fast it can be, on machines that need not exist."""
