"""Around the tasks: toy data, throughput, export and a look at the environment."""
