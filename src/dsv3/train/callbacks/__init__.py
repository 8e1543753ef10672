"""What happens beside training, one idea a file."""
