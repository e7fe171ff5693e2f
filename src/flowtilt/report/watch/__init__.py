"""`flowtilt watch`: the pages of runs while they go on, for a browser on this machine."""
