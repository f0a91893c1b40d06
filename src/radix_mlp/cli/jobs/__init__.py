"""What makes a job of the command line resumable."""
