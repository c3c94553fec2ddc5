"""What is asked of the operating system: files, signals, threads, forks, input from strangers."""
