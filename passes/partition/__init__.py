"""partition: the global program becomes the program of one rank."""
