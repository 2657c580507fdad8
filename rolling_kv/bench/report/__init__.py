"""All that is to be known of a machine in some minutes: the other benchmarks, each in a process of its own, under a time limit."""
