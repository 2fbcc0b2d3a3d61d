"""What a local program will send in its backward pass, and what it moves through device memory."""
