"""Many ranks in one process, and two programs compared: what the compiler is checked against."""
